"""Bad input gets a one-line error with name and rule, the same from every implementation."""

import functools
import inspect

import numpy as np
import pytest
import torch
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Index

from gaugeblock import kernels, reference
from tests.helpers import python

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRONGS = [
    pytest.param(op, wrong, id=f"{op.name}-{wrong.name}")
    for op in CATALOG.values()
    for wrong in op.errors
]


def wrong_call(op, wrong):
    """Inputs and options of the call that must be refused."""
    case, rng = op.cases[0], np.random.default_rng(0)
    inputs = op.draw(case, rng)
    for name, shape in wrong.shapes.items():
        integer = isinstance(op.inputs[name], Index)
        inputs[name] = np.zeros(shape, int) if integer else rng.standard_normal(shape)
    for name, change in wrong.values.items():
        inputs[name] = change(inputs[name])
    return inputs, {**op.options(case), **wrong.options}


def refuses(fn, op, inputs, options, wrong):
    with pytest.raises(wrong.raises, match=f"^{op.name}: {wrong.match}") as caught:
        fn(*inputs.values(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("op", "wrong"), WRONGS)
def test_the_reference_refuses(op, wrong):
    inputs, options = wrong_call(op, wrong)
    refuses(op.called(getattr(reference, op.name)), op, inputs, options, wrong)


def is_declared(op, wrong):
    """Whether the kernel has the options and the keyword inputs that a wrong call sets."""
    named = {
        *wrong.options,
        *(name for name in wrong.shapes if getattr(op.inputs[name], "keyword", False)),
    }
    return named <= set(inspect.signature(getattr(kernels, op.name)).parameters)


ASKED = [p for p in WRONGS if p.values[0].kernel is None and is_declared(*p.values)]


def test_a_kernel_is_asked_everything_that_it_takes():
    left_out = {p.id for p in WRONGS if p.values[0].kernel is None} - {p.id for p in ASKED}
    assert left_out == {
        "attention-stride_alone", "attention-stride_zero", "attention-half_a_stride",
        "attention-unknown_score", "attention-temperature_of_dots", "attention-temperatures",
        "sample-penalty_zero", "sample-penalty_alone", "sample-previous_rows",
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize(("op", "wrong"), ASKED)
def test_the_kernels_refuse(op, wrong, impl):
    inputs, options = wrong_call(op, wrong)
    tensors = {n: torch.from_numpy(x) for n, x in inputs.items()}
    device = DEVICE if impl == "triton" else "cpu"
    tensors = {
        n: (t.float() if t.is_floating_point() else t).to(device) for n, t in tensors.items()
    }
    if wrong.name == "target_too_large" and device == "cuda":
        pytest.skip("on CUDA a target out of range makes its loss NaN, as documented")
    fn = op.called(functools.partial(getattr(kernels, op.name), impl=impl))
    refuses(fn, op, tensors, options, wrong)


def tensors_of(name):
    op = CATALOG[name]
    inputs = op.draw(op.cases[0], np.random.default_rng(0))
    tensors = {n: torch.from_numpy(x) for n, x in inputs.items()}
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.mark.parametrize("name", [n for n, op in CATALOG.items() if op.kernel is None])
def test_kernels_refuse_wrong_kinds(name):
    op, tensors = CATALOG[name], tensors_of(name)
    fn = functools.partial(getattr(kernels, name), **op.options(op.cases[0]))
    first, *rest = (n for n in op.floating() if n in tensors)
    with pytest.raises(TypeError, match=f"{name}: {first} must be floating point"):
        fn(*{**tensors, first: tensors[first].int()}.values())
    with pytest.raises(TypeError, match=f"{name}: {first} must be one of float64, float32"):
        fn(*{**tensors, first: tensors[first].to(torch.float8_e4m3fn)}.values())
    with pytest.raises(TypeError, match=f"{name}: {first} must be a torch tensor"):
        fn(*{**tensors, first: tensors[first].numpy()}.values())
    with pytest.raises(ValueError, match=f"{name}: impl must be one of"):
        fn(*tensors.values(), impl="fast")
    if rest:
        last = rest[-1]
        if not op.inputs[last].dtype:
            with pytest.raises(TypeError, match=f"{name}: {last} must have {first}'s dtype"):
                fn(*{**tensors, last: tensors[last].half()}.values())
        with pytest.raises(ValueError, match=f"{name}: {last} must be on {first}'s device"):
            fn(*{**tensors, last: tensors[last].to("meta")}.values())


def test_triton_on_a_cpu_without_the_interpreter_is_refused():
    script = (
        "import torch\nfrom gaugeblock import kernels\n"
        "x = torch.randn(2, 8); w = torch.ones(8)\n"
        "kernels.layer_norm(x, w, w)\n"
        "kernels.layer_norm(x, w, w, impl='triton')\n"
    )
    ran = python("-c", script)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: layer_norm: impl='triton' needs a CUDA tensor")


def test_scalars_and_empty_columns_are_refused():
    none, scalar = torch.zeros(2, 0), torch.zeros(())
    for impl in ("triton", "eager"):
        for x in (none, scalar):
            with pytest.raises(ValueError, match=r"layer_norm: x must have shape \(\.\.\., N\)"):
                kernels.layer_norm(x, none[0], none[0], impl=impl)
            with pytest.raises(ValueError, match=r"cross_entropy: logits must have shape"):
                kernels.cross_entropy(x, torch.zeros(2, dtype=torch.long), impl=impl)
        q = torch.zeros(1, 1, 2, 0)
        with pytest.raises(ValueError, match="attention: q must have shape"):
            kernels.attention(q, q, q, impl=impl)
    with pytest.raises(TypeError, match="targets must be a torch tensor, got list"):
        kernels.cross_entropy(torch.zeros(2, 3), [0, 1])


def test_limits_of_the_kernels_are_errors():
    q = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(ValueError, match="D must be at most 256"):
        kernels.attention(q, q, q, impl="triton")
    x = torch.zeros(1, 65_537, device=DEVICE)
    with pytest.raises(ValueError, match="N must be at most 65536"):
        kernels.layer_norm(x, x[0], x[0], impl="triton")
