"""How far from exact the reference is, and what its tests see: `python -m tests.proof`."""
