"""One-line errors for tensors: name, rule, received value, remedy."""

import torch


def expect_shape(op, name, tensor, rule, shape):
    """Raise ValueError unless `tensor` has `shape`; None in `shape` leaves that dimension free."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want not in (None, have) for want, have in zip(shape, got)):
        free = any(want is None for want in shape)
        want = rule if free else f"{rule} = {tuple(shape)}"
        raise ValueError(f"{op}: {name} must have shape {want}, got {got}")


def expect_dimensions(op, name, tensor, rule):
    """Raise ValueError for a scalar, or a last dimension of length 0."""
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} must have shape {rule} with at least one column, "
            f"got {tuple(tensor.shape)}"
        )


def expect_choice(op, name, value, choices):
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def expect_alike(op, **tensors):
    """All are floating tensors of the first one's dtype, on its device."""
    (first, like), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; convert it")
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{op}: {name} must have {first}'s dtype {like.dtype}, got {tensor.dtype}; "
                "convert it"
            )
        if tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} must be on {first}'s device {like.device}, got {tensor.device}; "
                "move it"
            )
