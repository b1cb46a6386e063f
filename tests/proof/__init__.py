"""How far from exact the reference is, and what its own tests would see: `python -m tests.proof`."""
