"""One-line errors for tensors: name, rule, received value, remedy."""

import operator

import torch
from torch._subclasses.fake_tensor import FakeTensor

# what every kernel takes; eight-bit formats have none yet
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def expect_shape(op, name, tensor, rule, shape):
    """Raise ValueError unless `tensor` has `shape`; None in `shape` leaves that dimension free."""
    got = tuple(tensor.shape)
    # compared one by one: torch.compile does not find a symbolic size by `in`
    wrong = any(want is not None and want != have for want, have in zip(shape, got))
    if wrong or len(got) != len(shape):
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


def expect_floating(op, name, tensor):
    """Raise TypeError unless `tensor` has a floating dtype of 16 bits or more."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; convert it")
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{op}: {name} must be one of float64, float32, float16, bfloat16, "
            f"got {tensor.dtype}; convert it"
        )


def expect_alike(op, **tensors):
    """All are floating tensors of the first one's dtype, on its device."""
    (first, like), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch tensor, got {type(tensor).__name__}")
        expect_floating(op, name, tensor)
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


def expect_integers(op, name, tensor):
    """Raise TypeError unless `tensor` holds integers of 32 or 64 bits."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be integers (int32, int64), got {tensor.dtype}")


def expect_integer(op, name, value):
    """Raise TypeError unless `value` is an integer of some kind."""
    # what is one stays a symbol to torch.compile, whatever its value
    if not isinstance(value, (int, torch.SymInt)):
        try:
            operator.index(value)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"{op}: {name} must be an integer, got {kind}") from None


def expect_number(op, name, value):
    """Raise TypeError unless `value` is a real number of some kind."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not hasattr(
        value, "__float__"
    ):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def expect_dropout(op, name, p, seed):
    """Raise unless `p` (which the op calls `name`) lies in 0 … 1 and the seed has 64 bits."""
    expect_number(op, name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {name} must lie in 0 … 1, got {p}")
    expect_integer(op, "seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must lie in −2⁶³ … 2⁶⁴ − 1, got {seed}")


def readable(tensor):
    """Whether the values of a tensor can be checked: on the CPU, and not while it is traced."""
    real = tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    return real and not torch.compiler.is_compiling()
