"""What holds for kernels beside parity: registration, determinism, memory, float64."""

import functools
import math

import numpy as np
import pytest
import torch
from gaugeblock.kernels import _ffn
from gaugeblock.kernels._launch import cast
from gaugeblock.reference.catalog import CATALOG
from torch.utils._python_dispatch import TorchDispatchMode

from gaugeblock import kernels

WITH_KERNEL = [op for op in CATALOG.values() if op.kernel is None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case_of(op, name=None):
    return next(c for c in op.cases if name in (None, c.name))


def inputs_of(op, case, dtype=torch.float32):
    drawn = op.draw(case, np.random.default_rng(1))
    # an optional input that the case leaves out is None
    tensors = [torch.from_numpy(x).to(DEVICE) for x in drawn.values() if x is not None]
    return [
        t.to(dtype).requires_grad_(bool(op.differentiable())) if t.is_floating_point() else t
        for t in tensors
    ]


def call(op, case, inputs, **more):
    fn = op.called(getattr(kernels, op.name))
    y = fn(*inputs, **op.options(case), impl="triton", **more)
    return y if isinstance(y, tuple) else (y,)


def updated(op, inputs):
    """What the op updates in place."""
    return [inputs[list(op.inputs).index(name)] for name in op.updates.values()]


def gradients(op, inputs, ys):
    """Those of the floating inputs for output gradients of 1; none where the op has none."""
    if not op.differentiable():
        return []
    floating = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(ys, floating, [torch.ones_like(y) for y in ys])


class Calls(TorchDispatchMode):
    """Keeps the calls of our registered operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gaugeblock":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", WITH_KERNEL, ids=lambda op: op.name)
def test_operators_are_registered_as_torch_wants_them(op):
    case = case_of(op)
    inputs = inputs_of(op, case)
    with Calls() as calls:
        gradients(op, inputs, call(op, case, inputs))
    assert len(calls.seen) == 1 + bool(op.differentiable())
    for operator, arguments in calls.seen:
        forward = operator.name().endswith("_fwd")
        arguments = [
            x.detach().requires_grad_(forward and x.requires_grad)
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        wanted = torch.library.opcheck(operator, arguments)
        assert set(wanted.values()) == {"SUCCESS"}, (operator, wanted)


@pytest.mark.parametrize("op", WITH_KERNEL, ids=lambda op: op.name)
def test_compiles_as_one_graph_with_the_same_bits(op):
    # what all ops share is compiled anew for each, which has a limit
    torch.compiler.reset()
    case = case_of(op)
    fn = functools.partial(getattr(kernels, op.name), **op.options(case), impl="triton")
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = []
    for run in (fn, compiled):
        inputs = inputs_of(op, case)
        y = run(*inputs)
        ys = y if isinstance(y, tuple) else (y,)
        results.append(updated(op, inputs) or [*ys, *gradients(op, inputs, ys)])
    for plain, traced in zip(*results):
        assert torch.equal(plain, traced)


@pytest.mark.parametrize("op", WITH_KERNEL, ids=lambda op: op.name)
def test_repeats_are_bitwise_equal(op):
    cases = op.select(expression=op.supported)
    case = max(cases, key=lambda case: math.prod(op.dims(case).values()))
    runs = []
    for _ in range(3):
        inputs = inputs_of(op, case, torch.float16)
        ys = call(op, case, inputs)
        runs.append(updated(op, inputs) or [*ys, *gradients(op, inputs, ys)])
    for again in runs[1:]:
        for first, other in zip(runs[0], again):
            assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "shapes", "options"),
    [
        ("layer_norm", [(3, 5), (5,), (5,)], {}),
        ("ffn", [(2, 3), (3, 5), (5,), (5, 3), (3,)], {}),
        ("ffn", [(2, 3), (3, 5), (5,), (5, 3), (3,)], {"activation": "gelu"}),
        ("attention", [(1, 1, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2)], {"causal": True, "scale": 0.5}),
        ("attention", [(1, 1, 4, 2), (1, 1, 3, 2), (1, 1, 3, 2)],
         {"causal": True, "return_lse": True, "scale": 0.5, "align": "top_left"}),
    ],
)  # fmt: skip
def test_gradcheck_in_float64(name, shapes, options):
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(s, generator=draw, dtype=torch.float64).to(DEVICE).requires_grad_()
        for s in shapes
    ]
    fn = functools.partial(getattr(kernels, name), **options, impl="triton")
    assert torch.autograd.gradcheck(fn, inputs)


def test_gradcheck_of_the_loss_in_float64():
    logits = torch.randn(3, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    targets = torch.tensor([6, -100, 0], device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, how=reduction: kernels.cross_entropy(
                x, targets, reduction=how, label_smoothing=0.2, impl="triton"
            ),
            (logits,),
        )


def test_ffn_adds_leading_dimensions_and_attention_takes_views():
    x, w1, b1, w2, b2 = (
        torch.randn(s, device=DEVICE) for s in ((2, 3, 8), (8, 16), (16,), (16, 8), (8,))
    )
    y = kernels.ffn(x, w1, b1, w2, b2, impl="triton")
    flat = kernels.ffn(x.view(6, 8), w1, b1, w2, b2, impl="triton")
    assert torch.equal(y.view(6, 8), flat)
    qkv = torch.randn(2, 5, 3, 2, 8, device=DEVICE)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    o = kernels.attention(q, k, v, causal=True, impl="triton")
    copies = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(o, kernels.attention(*copies, causal=True, impl="triton"))


def test_an_empty_batch_gives_an_empty_answer():
    q = torch.zeros(0, 2, 3, 4, device=DEVICE)
    assert kernels.attention(q, q, q, impl="triton").shape == q.shape
    x = torch.zeros(0, 8, device=DEVICE)
    assert kernels.layer_norm(x, x.sum(0), x.sum(0), impl="triton").shape == x.shape


def test_ffn_keeps_a_nan():
    x = torch.tensor([[float("nan"), 1.0]], device=DEVICE)
    w1, b1, w2, b2 = (torch.ones(s, device=DEVICE) for s in ((2, 4), (4,), (4, 2), (2,)))
    for activation in _ffn.ACTIVATIONS:
        assert kernels.ffn(x, w1, b1, w2, b2, activation, impl="triton").isnan().all()


def test_rounding_to_bfloat16_is_to_nearest_even():
    import triton
    import triton.language as tl

    @triton.jit
    def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
        offs = tl.arange(0, N)
        tl.store(y_ptr + offs, cast(tl.load(x_ptr + offs), y_ptr.dtype.element_ty))

    ties = [1.00390625, 1.01171875, -1.01171875]
    special = [0.0, -0.0, *ties, float("inf"), 3.4e38, 1e-40]
    x = torch.cat([torch.tensor(special), torch.randn(1016)]).to(DEVICE)
    y = torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    _round_kernel[(1,)](x, y, N=1024)
    assert torch.equal(y, x.bfloat16())
    x[0] = float("nan")
    _round_kernel[(1,)](x, y, N=1024)
    assert y[0].isnan()
