"""Gaugeblock: the reference, the kernels, the model and the benchmarks that GPT is measured with.

The rooms are ``gaugeblock.reference``, ``gaugeblock.kernels``, ``gaugeblock.gpt`` and
``gaugeblock.benchmarks``. In a checkout their folders stand beside this one, so the checkout joins
the package's search path; an installed wheel holds them inside this package.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "reference" / "catalog.py").is_file():
    __path__.append(str(_checkout))
