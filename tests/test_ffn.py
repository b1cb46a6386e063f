"""The feed-forward network and its products: what parity does not show."""

import contextlib
import functools
import itertools

import pytest
import torch
from gaugeblock.kernels import _activations, _configurations, _product
from gaugeblock.kernels._launch import INTERPRETED
from gaugeblock.kernels.candidates import ffn as candidates
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import check
from gaugeblock.reference.oracle.repro import write_repro
from torch.utils._python_dispatch import TorchDispatchMode

from gaugeblock import kernels
from tests.helpers import python

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ffn = functools.partial(kernels.ffn, impl="triton")
ROWS = _configurations.rows("ffn")
NAMES = ("x", "w1", "b1", "w2", "b2", "residual")
# half a unit in the last place, relative
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def network(M, C, F, dtype=torch.float32):
    """x, w1, b1, w2, b2, residual."""
    shapes = (M, C), (C, F), (F,), (F, C), (C,), (M, C)
    scales = 1.0, C**-0.5, 1.0, F**-0.5, 1.0, 1.0
    return [
        normal(*shape, dtype=dtype, seed=i, scale=scale).requires_grad_()
        for i, (shape, scale) in enumerate(zip(shapes, scales))
    ]


def everything(tensors, activation="gelu_tanh", **options):
    """y and all gradients."""
    *given, residual = tensors
    y = ffn(*given, activation, residual=residual, **options)
    return y, *torch.autograd.grad(y, tensors, normal(*y.shape, dtype=y.dtype, seed=9))


class Created(TorchDispatchMode):
    """Keeps the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def equal(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.fixture
def launched(monkeypatch):
    """[(kernel's name, programs, options)] of every launch from here on."""
    seen = []
    launch = _product.launch

    def noted(kernel, programs, *arguments, **options):
        seen.append((kernel.fn.__name__, programs, options))
        launch(kernel, programs, *arguments, **options)

    monkeypatch.setattr(_product, "launch", noted)
    return seen


def tiles(seen):
    """Programs and options of the products alone."""
    return [(n, options) for name, n, options in seen if name == "_product_kernel"]


def near(got, want, K, dtype):
    """Whether an answer is within one rounding of it and those of a float32 sum of K terms."""
    want = want.double()
    sums = K * ROUNDING[torch.float32] * want.abs().max()
    return bool(((got.double() - want).abs() <= 2 * ROUNDING[dtype] * want.abs() + sums).all())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(row[k]) for k in candidates.KEY))
def test_every_configuration_of_the_table(row, launched, monkeypatch):
    """On several of its tiles, all ragged."""
    if not INTERPRETED and row["architecture"] != _configurations.architecture():
        pytest.skip("the row of another chip")
    monkeypatch.setattr(_product, "architecture", lambda: row["architecture"])
    dtype = torch.float32 if row["bits"] == 32 else torch.float16
    candidate = {name: row[name] for name in candidates.LAUNCH}
    problem = candidates.problem(row, dtype, DEVICE, candidate)
    got, want = problem.answers(), problem.twin(*(x.double() for x in problem.inputs))
    for name, a, b in zip(problem.names, got, want, strict=True):
        K = 300 if name != "db" else len(problem.inputs[0])
        assert near(a, b, K, dtype), name
    for programs, options in tiles(launched):
        assert candidate == {name: options[name] for name in candidate}
        # a tile in all directions would hide a wrong place
        assert programs > 1


def test_candidates_fit_and_begin_with_the_row():
    for row in ROWS:
        first, *others = candidates.candidates(row)
        assert first == {name: row[name] for name in candidates.LAUNCH}
        assert len(others) > 2
        assert first not in others
        assert all(set(x) == set(candidates.LAUNCH) for x in others)


@pytest.mark.parametrize("activation", _activations.ACTIVATIONS)
@pytest.mark.parametrize(("M", "C", "F"), [(3, 24, 40), (33, 31, 130)])
def test_gradients_have_the_same_bits_whatever_is_saved(activation, M, C, F):
    tensors = network(M, C, F, torch.float16)
    kept = everything(tensors, activation)
    assert equal(kept, everything(tensors, activation, save="inputs"))


def saved_elements(tensors, **options):
    """Elements of each tensor that a forward saves for its backward."""
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    )
    with hooks:
        ffn(*tensors[:5], residual=tensors[5], **options)
    return sizes


def test_nothing_wide_is_saved_with_the_inputs(monkeypatch):
    tensors = network(40, 8, 24)
    wide = 40 * 24
    assert saved_elements(tensors).count(wide) == 2
    assert max(saved_elements(tensors, save="inputs")) < wide
    # nor is z written, nor anything wide but a, on the way
    allocated = []
    empty = torch.empty

    def noted(*shape, **options):
        made = empty(*shape, **options)
        allocated.append(made.numel())
        return made

    monkeypatch.setattr(_product.torch, "empty", noted)
    for options, grad in (({"save": "inputs"}, True), ({}, False)):
        allocated.clear()
        with torch.set_grad_enabled(grad):
            ffn(*tensors[:5], **options)
        assert [n for n in allocated if n >= wide] == [wide]


def many(M, N, K, dtype=torch.float16, **options):
    """A product as a shape of many large tiles is launched."""
    a, b = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, seed=1)
    return _product.product(a, b, rows="many", **options)


def changed(**fields):
    """The table with some fields of all rows changed."""
    return _configurations.trial(
        "ffn", lambda key: {**_configurations._find("ffn", **key), **fields}
    )


def test_persistent_programs_give_the_same_bits(launched, monkeypatch):
    monkeypatch.setattr(_product, "multiprocessors", lambda device: 3)
    M, N, K = 270, 520, 136
    z = normal(M, N, dtype=torch.float16)
    for options in ({}, {"z": z, "epilogue": "slope", "activation": "gelu"}):
        with changed(PERSISTENT=True, TMA=True, BLOCK_M=64, BLOCK_N=128):
            persistent = many(M, N, K, **options)
        with changed(PERSISTENT=False, TMA=True, BLOCK_M=64, BLOCK_N=128):
            plain = many(M, N, K, **options)
        assert torch.equal(persistent, plain)
        # five rows of five tiles: the last round is not full
        assert [programs for programs, _ in tiles(launched)] == [3, 25]
        launched.clear()


def layouts():
    """Pairs of operands (M, K), (K, N), with either dimension of each contiguous."""
    a, b = normal(70, 136, dtype=torch.float16), normal(136, 88, dtype=torch.float16, seed=1)
    for a_turned, b_turned in itertools.product((False, True), repeat=2):
        yield (
            a.t().contiguous().t() if a_turned else a,
            b.t().contiguous().t() if b_turned else b,
            (a_turned, b_turned),
        )


def test_descriptors_and_pointers_give_the_same_bits(launched):
    if not INTERPRETED and _configurations.architecture() != "sm_90":
        pytest.skip("a GPU without descriptors cannot take them")
    # M = 70 is no multiple of 8: a matrix that is contiguous along it has no descriptor
    for a, b, turned in layouts():
        a = torch.cat([a, a[:2]]) if turned[0] is False else a[:64]
        a = a.t().contiguous().t() if turned[0] else a
        sums = [b.new_empty(88) for _ in range(4)]
        with changed(PERSISTENT=False, TMA=True):
            described = _product.product(a, b), _product.product(a, b, sums=sums[0]), sums[0]
        with changed(PERSISTENT=False, TMA=False):
            pointed = _product.product(a, b), _product.product(a, b, sums=sums[1]), sums[1]
        assert equal(described, pointed)
        flags = [
            (options["TMA"], options["A_TURNED"], options["B_TURNED"])
            for _, options in tiles(launched)
        ]
        assert flags == [(True, *turned)] * 2 + [(False, False, False)] * 2
        launched.clear()


def test_what_no_descriptor_can_describe_is_read_by_pointers(launched):
    aligned = normal(64, 128, dtype=torch.float16)
    assert _product.turned(aligned) is False
    assert _product.turned(aligned.t()) is True
    wrong = (
        normal(64, 129, dtype=torch.float16)[:, :128],
        normal(64 * 128 + 1, dtype=torch.float16)[1:].view(64, 128),
        normal(64, 256, dtype=torch.float16)[:, ::2],
        normal(1, 128, dtype=torch.float16).expand(64, 128),
    )
    assert _product.turned(aligned[:0]) is None
    for x in wrong:
        assert _product.turned(x) is None
        c = _product.product(x, aligned.t())
        assert near(c, x.double() @ aligned.t().double(), 128, torch.float16)
    assert not any(options["TMA"] for _, options in tiles(launched))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_cover_a_ragged_contraction(dtype, splits, launched, monkeypatch):
    part = 2
    monkeypatch.setattr(_product, "splitting", lambda tiles, steps, few: (splits, part))
    with changed(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, PERSISTENT=False):
        # the last split has one step, and that one is ragged
        K = 32 * (part * splits - 1) - 5
        a, b = normal(40, K, dtype=dtype), normal(K, 72, dtype=dtype, seed=1)
        sums, bias = b.new_empty(72), normal(72, dtype=dtype, seed=2)
        add = normal(40, 72, dtype=dtype, seed=3)
        c = _product.product(a, b, sums=sums, bias=bias, add=add)
    a, b = a.double(), b.double()
    assert near(c, a @ b + bias.double() + add.double(), K, dtype)
    assert near(sums, b.sum(0), K, dtype)
    assert [programs for programs, _ in tiles(launched)] == [2 * 3 * splits]
    merged = [name for name, *_ in launched if name == "_product_merge_kernel"]
    assert len(merged) == (splits > 1)


def test_the_number_of_splits_covers_every_step_and_is_bounded():
    for count, steps, few in itertools.product(
        (1, 3, 24, 72, 132, 1000), (0, 1, 2, 7, 25, 100, 512), (False, True)
    ):
        splits, part = _product.splitting(count, steps, few)
        assert 1 <= splits <= 16
        assert part >= 1
        assert (splits - 1) * part < max(steps, 1) <= splits * part
        assert _product.splitting(count, steps, few) == (splits, part)
    # GPT-2's weight gradient is split, its forward is not
    assert _product.splitting(72, 512, False)[0] > 1
    assert _product.splitting(1536, 12, False)[0] == 1


@pytest.mark.parametrize("M", [1, 16])
def test_few_rows_read_each_weight_once_in_many_programs(M, launched):
    C, F = 256, 512
    x, w1, b1, w2, b2, residual = network(M, C, F, torch.bfloat16)
    with torch.no_grad():
        ffn(x, w1, b1, w2, b2, residual=residual)
    kinds = ("fused", F), ("plain", C)
    for (programs, options), (kernel, N) in zip(tiles(launched), kinds, strict=True):
        row = _product._row(kernel, "few", torch.bfloat16)
        assert row["BLOCK_M"] == 16
        assert all(options[name] == row[name] for name in candidates.LAUNCH)
        assert options["SPLIT"]
        # one row of tiles, each split along the contraction
        assert programs >= 3 * -(-N // options["BLOCK_N"])
    assert [name for name, *_ in launched][1::2] == ["_product_merge_kernel"] * 2


def test_seventeen_rows_take_larger_tiles(launched):
    x, w1, b1, w2, b2, _ = network(17, 64, 64, torch.bfloat16)
    with torch.no_grad():
        ffn(x, w1, b1, w2, b2)
    assert all(options["BLOCK_M"] > 16 for _, options in tiles(launched))


def test_a_row_does_not_see_what_the_others_hold():
    for M in (5, 40):
        tensors = [t.detach() for t in network(M, 24, 40, torch.float16)]
        y = ffn(*tensors[:5])
        tensors[0][1:] = float("nan")
        assert torch.equal(ffn(*tensors[:5])[0], y[0])


def test_the_gradient_of_the_residual_is_dy_and_costs_nothing(launched):
    tensors = network(20, 16, 24)
    *_, dresidual = everything(tensors)
    assert torch.equal(dresidual, normal(20, 16, seed=9))
    with_residual = len(launched)
    launched.clear()
    y = ffn(*tensors[:5])
    torch.autograd.grad(y, tensors[:5], torch.ones_like(y))
    assert len(launched) == with_residual


def test_the_backward_makes_no_gradients_of_what_it_saves():
    """z and a are outputs to torch, which would fill memory of their size with zeros."""
    tensors = network(20, 16, 24)
    y = ffn(*tensors[:5])
    with Created() as created:
        torch.autograd.grad(y, tensors[:5], normal(20, 16, seed=9))
    assert not [name for name in created.names if "zeros" in name]


def test_a_launch_finds_its_device_among_several(launched, monkeypatch):
    """Where the first operand is a descriptor, too."""
    asked = []

    def device_of(x):
        asked.append(x.device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    a, b = normal(64, 128, dtype=torch.float16), normal(128, 64, dtype=torch.float16, seed=1)
    _product.product(a, b)
    ((_, options),) = tiles(launched)
    assert options["TMA"] == (_configurations.architecture() == "sm_90")
    assert set(asked) == {a.device}


@pytest.mark.parametrize("activation", _activations.ACTIVATIONS)
@pytest.mark.parametrize("z", [-1e12, -200.0, 200.0, 1e12])
def test_far_out_an_activation_is_0_or_its_argument(z, activation):
    """Nothing of a bounded exponential is left: a unit that is off has no gradient."""
    x = torch.tensor([[z]], requires_grad=True)
    one, none = torch.ones(1, 1), torch.zeros(1)
    y = ffn(x, one, none, one, none, activation)
    (dx,) = torch.autograd.grad(y, x, one)
    assert (y.item(), dx.item()) == ((x.item(), 1) if z > 0 else (0, 0))


def test_a_product_accumulates_in_float32_in_place():
    a, b = normal(40, 100, dtype=torch.bfloat16), normal(100, 72, dtype=torch.bfloat16, seed=1)
    total, before = normal(40, 80, seed=2), normal(40, 80, seed=2)
    out = total[:, :72]
    assert _product.product(a, b, out=out, add=out) is out
    assert near(out, before[:, :72].double() + a.double() @ b.double(), 100, torch.float32)
    assert torch.equal(total[:, 72:], before[:, 72:])


def test_an_empty_contraction_leaves_the_epilogue():
    x, b2, residual = normal(20, 8), normal(8, seed=1), normal(20, 8, seed=2)
    none = torch.zeros(8, 0, device=DEVICE), torch.zeros(0, device=DEVICE)
    w2 = torch.zeros(0, 8, device=DEVICE)
    tensors = [t.requires_grad_() for t in (x, *none, w2, b2)]
    y = ffn(*tensors, residual=residual)
    assert torch.equal(y, b2 + residual)
    dy = normal(20, 8, seed=3)
    dx, _, _, _, db2 = torch.autograd.grad(y, tensors, dy)
    assert not dx.any()
    assert near(db2, dy.double().sum(0), 20, torch.float32)


def test_wrong_choices_are_refused_in_one_line():
    tensors = network(2, 4, 6)
    with pytest.raises(ValueError, match="ffn: save must be one of activations, inputs, got 'z'"):
        ffn(*tensors[:5], save="z")
    with pytest.raises(TypeError, match="ffn: residual must have x's dtype"):
        ffn(*tensors[:5], residual=tensors[5].half())


# the oracle, with functions of other people


def five_tensors(x, w1, b1, w2, b2, activation="gelu_tanh"):
    return kernels.eager.ffn(x, w1, b1, w2, b2, activation)


def residual_forgotten(x, w1, b1, w2, b2, activation="gelu_tanh", residual=None):
    return five_tensors(x, w1, b1, w2, b2, activation)


def test_a_function_without_a_residual_is_checked_on_all_other_cases():
    with_residual = [case.name for case in CATALOG["ffn"].cases if case.keywords]
    with_residual = [name for name in with_residual if not name.startswith("compiled")]
    report = check("ffn", five_tensors, cases="full", layouts=("contiguous",), memory=False)
    assert report.passed
    assert not {r.case for r in report.results} & set(with_residual)
    said = [line.split(":") for line in report.not_checked if "declare" in line]
    assert [name for name, _ in said] == with_residual
    assert all(reason == " the candidate does not declare residual" for _, reason in said)


def test_a_residual_that_is_forgotten_is_seen(tmp_path):
    report = check("ffn", residual_forgotten, expression="residual", layouts=("contiguous",))
    assert {r.output for r in report.failures} >= {"y", "dresidual"}
    first = report.failures[0]
    path = write_repro(tmp_path, CATALOG["ffn"], first, "tests.test_ffn:residual_forgotten")
    ran = python(path)
    assert ran.returncode == 1, ran.stderr
    assert "budget" in ran.stdout
