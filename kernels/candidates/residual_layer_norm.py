"""What `gaugeblock tune` tries on the rows of `residual_layer_norm`'s table."""

from .layer_norm import KEY, LAUNCH, candidates, make_problem

__all__ = ["KEY", "LAUNCH", "candidates", "problem"]


def problem(row, dtype, device, candidate=None):
    """`residual_layer_norm`, both of whose outputs have gradients, on inputs of the row's class."""
    return make_problem("residual_layer_norm", row, dtype, device, candidate)
