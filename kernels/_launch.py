"""What every kernel shares: which implementation runs, how it is launched, products, rounding."""

from collections import Counter

import torch
import triton
import triton.language as tl

from ._checks import expect_choice

# Triton decides at import: a process is either interpreted or compiled, never both.
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_IEEE: tl.constexpr = tl.constexpr("ieee")

# Launches by kernel name, so that a test can tell that a Triton kernel ran.
LAUNCHES = Counter()


def resolve(op, impl, tensor):
    """The implementation that `impl` names for this tensor: "triton" or "eager"."""
    expect_choice(op, "impl", impl, ("auto", "triton", "eager"))
    runs = tensor.is_cuda or INTERPRETED
    if impl == "triton" and not runs:
        raise ValueError(
            f"{op}: impl='triton' needs a CUDA tensor or Triton's interpreter, got one on "
            f"{tensor.device}; set TRITON_INTERPRET=1 before triton is imported, or impl='eager'"
        )
    if impl == "auto":
        # kernels take scalars such as eps in float32, which float64 users did not ask for
        return "triton" if runs and tensor.dtype != torch.float64 else "eager"
    return impl


def launch(kernel, programs, *args, **options):
    """Run `kernel` on a grid of `programs`, on the device of its first tensor."""
    if programs == 0:
        return
    LAUNCHES[kernel.fn.__name__] += 1
    if torch.cuda.device_count() > 1:
        # what comes first may be a descriptor, which knows no device
        with torch.cuda.device_of(next(x for x in args if isinstance(x, torch.Tensor))):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def contiguous_rows(x):
    """x where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulator(dtype):
    """The torch dtype of statistics and accumulators: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x):
    """x in its accumulators' dtype."""
    return x.to(accumulator(x.dtype))


def tl_accumulator(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def tile(length, largest, smallest=16):
    """The smallest power of two that covers `length`, within the limits."""
    return max(smallest, min(largest, triton.next_power_of_2(max(length, 1))))


@triton.jit
def _widened(x):
    """bfloat16 as float32 by its bits: the interpreter's own conversion spoils subnormals."""
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = _IEEE):
    """acc + a b, float32 products in IEEE arithmetic, TF32 only where it is asked for."""
    if _INTERPRETED:
        # the interpreter multiplies bfloat16's bit patterns
        if a.dtype == tl.bfloat16:
            a = _widened(a)
            b = _widened(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to the nearest value of dtype, ties to even."""
    if _INTERPRETED:
        # the interpreter truncates float32 to bfloat16 and spoils subnormals: round the bits here
        if dtype == tl.bfloat16:
            if x.dtype == tl.float32:
                bits = x.to(tl.uint32, bitcast=True)
                bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
                return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
