"""How a row of the catalog is made."""

from __future__ import annotations

from importlib import import_module

from ..oracle.op import Op

# what is timed: the family's own shapes first, then large ones, then those that complete a curve
FAMILY, LARGE, SWEEP = ("bench", "family"), ("bench", "large"), ("bench", "sweep")
# what is timed where there is no GPU
CPU = ("bench", "cpu")


def row(name, inputs, cases, **rest):
    """The op whose formula and gradient are `NAME` and `NAME_backward` in `_NAME.py`."""
    module = import_module(f".._{name}", __package__)
    forward, backward = getattr(module, name), getattr(module, f"{name}_backward", None)

    def gradients(dy, *arrays, **options):
        return backward(dy, op.called(forward)(*arrays, **options)[1])

    op = Op(
        name,
        lambda *arrays, **options: op.called(forward)(*arrays, **options)[0],
        inputs,
        cases,
        backward=gradients if backward else None,
        **rest,
    )
    return op
