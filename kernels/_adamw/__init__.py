"""One step of AdamW, in place: Adam with decoupled weight decay, clipping by the global norm fused.

    g ← g·min(1, max_norm/(‖g‖ + 1e-6))      where max_norm is given; ‖g‖ over all tensors of g
    p ← p·(1 − lr·λ)
    m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    p ← p − lr·m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

Shapes: p, g, m, v, master (...), all alike, one tensor each or lists of them. Any strides: where
the tensors have gaps or lie in different orders, copies are made and written back. g is not
changed, clipped or not.
Algorithm: tensors are cut in chunks, a program a chunk. A list's addresses, sizes, hyperparameters
and chunks lie in tables on the device, so that a whole model is one launch (one for each mixture of
dtypes, and one more where some tensors lie at odd addresses: those are not read 16 bytes at a
time). Clipping adds two: sums of squares of up to 1,024 programs, each its chunks in turn, and one
program that adds them; the step reads the norm from memory, and the host never waits. No atomics:
deterministic bit for bit. p is updated with m and v before they are rounded.
No gradient: an optimiser's step ends the graph.
dtypes: float16, bfloat16, float32, float64 (hyperparameters pass as float32). For 16-bit p, g, m
and v may be float32; `master` are float32 weights of which p gets the rounding.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; the clipping as
torch.nn.utils.clip_grad_norm_; tables of addresses as in NVIDIA Apex's multi-tensor kernels.
"""

import math

import torch

from .._checks import expect_floating, expect_integer, expect_number, expect_shape
from .._launch import accumulator, resolve, wide
from . import launchers

_HYPERPARAMETERS = ("step", "lr", "beta1", "beta2", "eps", "weight_decay")


def _launch_all(
    p, g, m, v, step=1, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1
):  # fmt: skip
    """Every kernel straight through the launchers, to be compiled: a list's tables hold anything.

    Lists of 16-bit tensors come with what training keeps in float32.
    """
    numbers = [launchers.coefficients(step, lr, beta1, beta2, eps, weight_decay)]
    one = launchers.Batch([(p, g, m, v, None)], numbers, True)
    wide_state = (p, g, *(x.new_empty(x.shape, dtype=torch.float32) for x in (m, v, p)))
    tensors = wide_state if p.dtype.itemsize == 2 else (p, g, m, v, None)
    several = launchers.Batch([tensors] * 2, numbers * 2, True)
    tables = launchers.Tables(
        *(p.new_empty((2, n), dtype=torch.int64) for n in (6, 2, 2)),
        p.new_empty((2, 7), dtype=torch.float32),
    )
    norm = p.new_empty((), dtype=accumulator(p.dtype))
    launchers.run([(one, None)], None, None, False)
    launchers.run([(one, None), (several, tables)], norm, 1.0, True)


@torch.library.custom_op("gaugeblock::adamw_fwd", mutates_args=("p", "m", "v", "master", "norm"))
def _fwd_op(
    p: list[torch.Tensor], g: list[torch.Tensor], m: list[torch.Tensor], v: list[torch.Tensor],
    master: list[torch.Tensor], has_master: list[bool], norm: torch.Tensor | None,
    step: list[int], lr: list[float], beta1: list[float], beta2: list[float], eps: list[float],
    weight_decay: list[float], max_norm: float, skip_nonfinite: bool,
) -> None:  # fmt: skip
    # an operator's list has no None
    masters = iter(master)
    tensors = zip(p, g, m, v, (next(masters) if has else None for has in has_master))
    hyperparameters = zip(step, lr, beta1, beta2, eps, weight_decay)
    launchers.forward(tensors, hyperparameters, norm, max_norm, skip_nonfinite)


@_fwd_op.register_fake
def _(*arguments):
    pass


@torch.no_grad()
def _eager(
    p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, *, master=None, max_norm=None,
    skip_nonfinite=False,
):  # fmt: skip
    """The plain torch twin."""
    p, g, m, v, master = (_listed(x) for x in (p, g, m, v, master))
    norm, factor = None, None
    if max_norm is not None:
        norms = [torch.linalg.vector_norm(x, dtype=accumulator(x.dtype)) for x in g]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if skip_nonfinite and not norm.isfinite():
            return norm
    every = (_per_tensor(x, len(p)) for x in (step, lr, beta1, beta2, eps, weight_decay))
    tensors = zip(p, g, m, v, master or [None] * len(p), strict=True)
    for (p_i, g_i, m_i, v_i, master_i), numbers in zip(tensors, zip(*every)):
        decay, rate1, b2, rate2, length, root, e = launchers.coefficients(*numbers)
        p32 = wide(p_i) if master_i is None else master_i
        g32, m32, v32 = wide(g_i), wide(m_i), wide(v_i)
        if norm is not None:
            g32 = g32 * factor
        m32.lerp_(g32, rate1)
        v32.mul_(b2).addcmul_(g32, g32, value=rate2)
        p32.mul_(decay).addcdiv_(m32, v32.sqrt().mul_(root).add_(e), value=-length)
        for x, x32 in ((p_i, p32), (m_i, m32), (v_i, v32)):
            if x is not x32:
                x.copy_(x32)
    return norm


def adamw(
    p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, *, master=None, max_norm=None,
    skip_nonfinite=False, impl="auto",
):  # fmt: skip
    """One step of AdamW in place. Returns the norm of g where max_norm is given, else None.

    p, g, m, v: tensors of one shape, or lists of them. g, m and v have p's dtype or, for 16-bit p,
    float32. master: float32 weights of 16-bit p, which are updated and of which p gets the
    rounding; in a list None for those that have none.
    step:     1 for the first. step, lr, beta1, beta2, eps and weight_decay are numbers on the host,
              each of them alternatively a list with one for each tensor of a list.
    max_norm: scales g, while it is read, to a norm over all tensors of no more than this, as
              torch.nn.utils.clip_grad_norm_ does. The norm is returned as a float32 tensor (of
              float64 tensors float64) without dimensions, which is not waited for.
    skip_nonfinite: where the norm is not finite, leave everything as it is. Without it inf and NaN
              pass into all tensors, as with torch.
    Raises ValueError for shapes, devices or hyperparameters that do not fit, TypeError for kinds.
    """
    lists = isinstance(p, (list, tuple))
    state = {"p": p, "g": g, "m": m, "v": v} | ({} if master is None else {"master": master})
    state = _expect_state(state, lists)
    p, g, m, v = (state[name] for name in "pgmv")
    every = _expect_hyperparameters(
        (step, lr, beta1, beta2, eps, weight_decay), len(p) if lists else None
    )
    _expect_clipping(max_norm, skip_nonfinite)
    if not p:
        return None if max_norm is None else torch.zeros(())
    master = state.get("master", [None] * len(p))
    if resolve("adamw", impl, p[0]) == "eager":
        return _eager(
            p, g, m, v, *every, master=master, max_norm=max_norm, skip_nonfinite=skip_nonfinite
        )
    norm = None
    if max_norm is not None:
        norm = torch.empty((), dtype=accumulator(p[0].dtype), device=p[0].device)
    masters, has_master = [x for x in master if x is not None], [x is not None for x in master]
    with torch.no_grad():
        _fwd_op(p, g, m, v, masters, has_master, norm, *every, float(max_norm or 0), skip_nonfinite)
    return norm


def _listed(x):
    if x is None:
        return []
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _per_tensor(x, count):
    return list(x) if isinstance(x, (list, tuple)) else [x] * count


def _expect_state(state, lists):
    """p, g, m, v and perhaps master, each as a list of tensors that fit."""
    if any(isinstance(x, (list, tuple)) != lists for x in state.values()):
        raise TypeError("adamw: p, g, m, v and master must be all tensors or all lists, got both")
    state = {name: _listed(x) for name, x in state.items()}
    count = len(state["p"])
    for name, x in state.items():
        if len(x) != count:
            raise ValueError(f"adamw: {name} must have as many tensors as p, {count}, got {len(x)}")
    for i, tensors in enumerate(zip(*state.values())):
        index = f"[{i}]" if lists else ""
        for name, x in zip(state, tensors):
            if name != "master" or x is not None:
                _expect_kind(name, index, x, tensors[0])
                _expect_place(name, index, x, tensors[0], state["p"][0].device)
    return state


def _expect_kind(name, index, x, p):
    """Raise TypeError unless it is a dense floating tensor whose dtype goes with p's."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"adamw: {name}{index} must be a torch tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"adamw: {name}{index} must be dense, got {x.layout}; use .to_dense()")
    expect_floating("adamw", name + index, x)
    short = p.dtype.itemsize == 2
    if name == "master":
        if x.dtype != torch.float32 or not short:
            raise TypeError(
                f"adamw: master{index} must be float32 weights of 16-bit p, got {x.dtype} of "
                f"{p.dtype}; leave it out or convert it"
            )
    elif x.dtype != p.dtype and not (short and x.dtype == torch.float32):
        more = " or float32" if short else ""
        raise TypeError(
            f"adamw: {name}{index} must have p's dtype {p.dtype}{more}, got {x.dtype}; convert it"
        )


def _expect_place(name, index, x, p, device):
    """Raise ValueError unless it has p's shape, the device of all, and memory that may change."""
    if x.device != device:
        raise ValueError(
            f"adamw: {name}{index} must be on p's device {device}, got {x.device}; move it"
        )
    if x.shape != p.shape:
        expect_shape("adamw", f"{name}{index}", x, "as p", tuple(p.shape))
    if name == "g" or x.is_contiguous():
        return
    if any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape)):
        raise ValueError(
            f"adamw: {name}{index} must have memory for every element, got stride 0; clone it"
        )


def _expect_hyperparameters(values, count):
    """Each of them as a list with one for each of `count` tensors; None: a tensor alone."""
    every = []
    for name, value in zip(_HYPERPARAMETERS, values):
        own = _per_tensor(value, count or 1)
        if isinstance(value, (list, tuple)) and len(own) != count:
            raise ValueError(
                f"adamw: {name} must be a number or, for lists of tensors, a list with one for "
                f"each, got {len(own)}"
            )
        # those of a model are few: each is looked at once
        for x in own[:1] if own == own[:1] * len(own) else own:
            _expect_hyperparameter(name, x)
        every.append(own)
    return every


def _expect_hyperparameter(name, x):
    if isinstance(x, torch.Tensor):
        raise TypeError(f"adamw: {name} must be a number on the host, got a tensor; use .item()")
    if name == "step":
        expect_integer("adamw", "step", x)
        if x < 1:
            raise ValueError(f"adamw: step must be at least 1, got {x}; the first step is 1")
        if x >= 2**63:
            raise ValueError(f"adamw: step must be below 2⁶³, got {x}")
        return
    expect_number("adamw", name, x)
    if name in ("beta1", "beta2"):
        if not 0 <= x < 1:
            raise ValueError(f"adamw: {name} must lie in 0 … 1, 1 excluded, got {x}")
    elif not 0 <= x < math.inf:
        raise ValueError(f"adamw: {name} must be finite and at least 0, got {x}")


def _expect_clipping(max_norm, skip_nonfinite):
    if max_norm is None and skip_nonfinite:
        raise ValueError(
            "adamw: skip_nonfinite must come with max_norm, got None; max_norm=math.inf clips "
            "nothing"
        )
    if max_norm is not None:
        expect_number("adamw", "max_norm", max_norm)
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"adamw: max_norm must be > 0, got {max_norm}")
