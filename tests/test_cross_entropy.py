"""Cross-entropy beside parity: splits, gradients with the loss, overwriting, row strides, bits."""

import functools

import pytest
import torch
from gaugeblock.kernels import _configurations
from gaugeblock.kernels import _cross_entropy as module
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import cross_entropy as candidates
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.result import describe

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = CATALOG["cross_entropy"]
NAN = float("nan")
cross_entropy = functools.partial(kernels.cross_entropy, impl="triton")
with_loss = functools.partial(cross_entropy, gradient="with_loss")


def draw(M, V, dtype=torch.float32, stride=None, seed=0):
    """logits (M, V), rows `stride` apart with NaN between them, and targets, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((M, stride or V), NAN, dtype=dtype)
    logits[:, :V] = torch.randn((M, V), generator=generator)
    targets = torch.randint(V, (M,), generator=generator)
    targets[1::3] = -100
    return logits.to(DEVICE)[:, :V], targets.to(DEVICE)


def judge(fn, case, dtype, layout="contiguous"):
    results = Expectation(OP, case, dtype).judge(TorchAdapter(DEVICE), fn, layout)
    assert not [describe(r) for r in results if not r.passed]
    assert len(results) == 2


ROWS = _configurations.rows("cross_entropy")


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['kernel']}-{r['architecture']}-{r['bits']}"
)
def test_every_configuration_of_the_table(row, monkeypatch):
    """On a row of several tiles, the last ragged."""
    monkeypatch.setattr(module, "architecture", lambda: row["architecture"])
    kernel = row["kernel"]
    rows = module._FEW_ROWS + 1 if kernel == "with_loss" else 3
    V = row["BLOCK_V"] + 37
    if kernel == "with_loss":
        monkeypatch.setattr(module, "_FEW_ROWS", rows := 2)
    dtype = "float32" if row["bits"] == 32 else "bfloat16"
    used = []
    find = _configurations.find
    monkeypatch.setattr(module, "find", lambda op, **key: used.append(find(op, **key)) or used[-1])
    fn = with_loss if kernel == "with_loss" else cross_entropy
    judge(fn, Case("configuration", M=rows, V=V, reduction="none"), dtype)
    assert row in used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by", [-9, -8, -7, -1, 0, 1])
def test_rows_that_end_about_a_tile(by, dtype):
    """Rows begin anywhere in a step of 16 bytes: the tiles are one more or not."""
    tile = module._options("forward", 50257, torch.empty((1, 9), dtype=getattr(torch, dtype)))[0]
    judge(cross_entropy, Case("edge", M=9, V=tile["BLOCK_V"] + by, reduction="none"), dtype)


@pytest.mark.parametrize("many", [True, False], ids=["row_a_program", "split"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["odd", "none", "sum", "ignored", "ignored_none", "all_ignored_sum", "all_ignored_mean",
     "smoothed_ignored", "logits_spread_by_100", "rank_three", "one_token", "negative",
     "padded_vocabulary", "first_tile_masked", "ignore_index", "no_rows"],
)  # fmt: skip
def test_the_gradient_with_the_loss_keeps_the_same_budget(name, dtype, many, monkeypatch):
    if many:
        monkeypatch.setattr(module, "_FEW_ROWS", 0)
    case = next(case for case in OP.cases if case.name == name)
    for layout in ("contiguous", "sliced", "transposed"):
        judge(with_loss, case, dtype, layout)


@pytest.mark.parametrize("many", [True, False], ids=["row_a_program", "split"])
@pytest.mark.parametrize("stride", [301, 304, 333])
def test_in_place_only_when_asked(stride, many, monkeypatch):
    """The same gradient bit for bit, over the logits or beside them; between rows nothing."""
    if many:
        monkeypatch.setattr(module, "_FEW_ROWS", 0)
    for reduction in ("mean", "sum", "none"):
        found = []
        for inplace in (False, True):
            rows, targets = draw(6, 301, torch.bfloat16, stride)
            buffer, before = rows._base, rows._base.clone()
            logits = rows.detach().requires_grad_()
            loss = with_loss(logits * 1, targets, reduction=reduction)
            assert torch.equal(buffer.view(torch.int16), before.view(torch.int16))
            loss = with_loss(logits, targets, reduction=reduction, inplace=inplace)
            # the gradient is written with the loss, not before and not later
            changed = not torch.equal(rows, before[:, :301])
            assert changed == inplace
            loss.backward(torch.full_like(loss, 0.5))
            assert torch.equal(logits.grad, rows) == inplace
            gap, gap_before = buffer[:, 301:], before[:, 301:]
            assert torch.equal(gap.view(torch.int16), gap_before.view(torch.int16))
            found.append((loss.detach(), logits.grad))
        for beside, over in zip(*found):
            assert torch.equal(beside, over)


def test_nothing_is_overwritten_without_a_gradient():
    logits, targets = draw(4, 30)
    before = logits.clone()
    with_loss(logits, targets, inplace=True)
    with torch.no_grad():
        with_loss(logits.requires_grad_(), targets, inplace=True)
    assert torch.equal(logits, before)
    kernels.cross_entropy(logits, targets, gradient="with_loss", inplace=True, impl="eager")
    assert torch.equal(logits, before)


def test_version_counters_see_what_was_overwritten():
    leaf, targets = draw(4, 30)
    leaf.requires_grad_()
    logits = leaf * 2
    squares = logits.square().sum()
    loss = with_loss(logits, targets, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # beside the logits: they stay, a second backward would scale twice
    leaf.grad = None
    logits = leaf * 2
    squares, loss = logits.square().sum(), with_loss(logits, targets)
    (squares + loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_is_refused_where_it_cannot_be():
    logits, targets = draw(4, 30)
    with pytest.raises(ValueError, match="inplace needs gradient='with_loss', got 'later'"):
        cross_entropy(logits, targets, inplace=True)
    overlapping = logits[:1].expand(4, 30)
    with pytest.raises(ValueError, match=r"elements do not overlap, got strides \(0, 1\)"):
        with_loss(overlapping, targets, inplace=True)
    apart = torch.randn(2, 30, 2, device=DEVICE).mT.transpose(0, 1)
    with pytest.raises(ValueError, match="whose rows one stride describes"):
        with_loss(apart, targets.view(2, 2), inplace=True)
    with pytest.raises(ValueError, match="gradient must be one of later, with_loss, got 'now'"):
        cross_entropy(logits, targets, gradient="now")
    with pytest.raises(TypeError, match="logits must be floating point"):
        with_loss(logits.int(), targets, inplace=True)


@pytest.mark.parametrize("gradient", module.GRADIENTS)
def test_padded_rows_are_read_and_written_at_their_stride(gradient, monkeypatch):
    """A slice of a padded buffer: no copy, the gradient's rows as far apart."""
    rows, targets = draw(5, 301, stride=304)
    dense = rows.contiguous()
    found = []
    for x in (rows, dense):
        x = x.detach().requires_grad_()
        loss = cross_entropy(x, targets, gradient=gradient, reduction="sum")
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert module._new_gradient(rows).stride() == (304, 1)
    assert module._new_gradient(dense).stride() == (301, 1)
    # nor is memory taken for what lies between far rows
    assert module._new_gradient(torch.empty(3, 5000)[:, :30]).stride() == (30, 1)
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: copied.append(x.dtype) or contiguous(x)
    )
    cross_entropy(rows.view(5, 301), targets, gradient=gradient)
    assert torch.float32 not in copied


@pytest.mark.parametrize("many", [True, False], ids=["row_a_program", "split"])
@pytest.mark.parametrize("gradient", module.GRADIENTS)
def test_a_row_depends_on_no_other_and_not_on_their_number(gradient, many, monkeypatch):
    V = 9001
    logits, targets = draw(5, V, torch.bfloat16)
    found = {}
    for M in (1, 3, 5):
        if many:
            monkeypatch.setattr(module, "_FEW_ROWS", M if M == 3 else M + 1)
        x = logits[:M].clone().requires_grad_()
        losses = cross_entropy(x, targets[:M], gradient=gradient, reduction="none")
        found[M] = losses.detach(), torch.autograd.grad(losses.sum(), x)[0]
    x = logits.clone()
    x[1:] = x[1:] * 3
    assert torch.equal(found[1][0], found[5][0][:1])
    for few, all_rows in zip(found[3], found[5]):
        assert torch.equal(few, all_rows[:3])
    others = cross_entropy(x, targets, reduction="none")
    if gradient == "later":
        assert torch.equal(others[:1], found[5][0][:1])
    assert not torch.equal(others[2:], found[5][0][2:])


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("gradient", module.GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
def test_short_targets_are_numbers_like_any(dtype, gradient, impl):
    """V and ignore_index are others in these dtypes."""
    fn = functools.partial(kernels.cross_entropy, gradient=gradient, impl=impl)
    targets = torch.tensor([5, 100, 156 if dtype == torch.uint8 else 7], device=DEVICE)
    for V in (200, 40_000):
        logits = draw(3, V)[0].requires_grad_()
        found = []
        for t in (targets, targets.to(dtype)):
            loss = fn(logits, t)
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("gradient", module.GRADIENTS)
def test_ignored_rows_are_not_read(gradient, impl):
    logits, targets = draw(7, 40)
    logits[targets == -100] = NAN
    logits.requires_grad_()
    loss = kernels.cross_entropy(logits, targets, gradient=gradient, impl=impl, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad[targets == -100] == 0).all()
    assert (logits.grad[targets != -100] != 0).all()


def test_infinite_gradients_of_ignored_rows_are_0():
    logits, targets = draw(7, 40)
    dlosses = torch.where(targets == -100, NAN, 2.0)
    for gradient in module.GRADIENTS:
        x = logits.detach().requires_grad_()
        losses = cross_entropy(x, targets, gradient=gradient, reduction="none")
        losses.backward(dlosses)
        assert x.grad.isfinite().all()


def test_scaling_leaves_ignored_rows(monkeypatch):
    logits, targets = draw(4, 30)
    dlogits = torch.empty_like(logits)
    dlogits[:] = 3.0
    module._scale(dlogits, torch.full((), 2.0, device=DEVICE), targets, -100)
    kept = targets != -100
    assert (dlogits[kept] == 6).all() and (dlogits[~kept] == 3).all()
    monkeypatch.setattr(module, "_SCALE_PROGRAMS", 2)
    dlogits[:] = 3.0
    rates = torch.arange(1.0, 5.0, device=DEVICE)
    module._scale(dlogits, rates, targets, -100)
    assert torch.equal(dlogits[kept], (3 * rates[kept])[:, None].expand(-1, 30))


def test_launches():
    logits, targets = draw(4, 30)
    logits.requires_grad_()
    LAUNCHES.clear()
    cross_entropy(logits, targets).backward()
    assert LAUNCHES == {
        "_cross_entropy_parts_kernel": 1, "_loss_merge_kernel": 1, "_cross_entropy_bwd_kernel": 1,
    }  # fmt: skip
    logits, targets = draw(module._FEW_ROWS, 30)
    LAUNCHES.clear()
    with_loss(logits.requires_grad_(), targets).backward()
    assert LAUNCHES == {"_cross_entropy_fwd_bwd_kernel": 1, "_cross_entropy_scale_kernel": 1}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_are_registered_as_torch_wants_them(reduction):
    logits, targets = draw(4, 30)
    options = targets, -100, 0.1, reduction
    loss, dlogits = module._with_gradient_op(logits, *options)
    for operator, arguments in (
        (module._with_gradient_op, (logits, *options)),
        (module._with_gradient_inplace_op, (logits.clone(), *options)),
        (module._scale_op, (dlogits.clone(), loss, targets, -100)),
        (
            module._known_gradient_op,
            (logits.clone().requires_grad_(), loss, dlogits, targets, -100),
        ),
    ):
        wanted = torch.library.opcheck(operator, arguments)
        assert set(wanted.values()) == {"SUCCESS"}, (operator, wanted)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_with_the_same_bits(reduction, inplace):
    leaf, targets = draw(4, 30)

    def fn(x):
        return with_loss(x * 2, targets, reduction=reduction, inplace=inplace)

    found = []
    for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        x = leaf.detach().requires_grad_()
        loss = run(x)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum() * 3, x)))
    for plain, traced in zip(*found):
        assert torch.equal(plain, traced)


def test_gradcheck_in_float64():
    logits, targets = draw(4, 9, torch.float64)
    logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = functools.partial(with_loss, reduction=reduction, label_smoothing=0.2)
        (mine,) = torch.autograd.grad(loss(logits, targets).sum() * 3, logits)
        later = cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.2)
        (want,) = torch.autograd.grad(later.sum() * 3, logits)
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row", [r for r in ROWS if r["architecture"] == "sm_90"],
                         ids=lambda r: f"{r['kernel']}-{r['bits']}")  # fmt: skip
def test_what_tune_tries_is_right(row, monkeypatch):
    own, *others = candidates.candidates(row)
    assert own == {name: row[name] for name in candidates.LAUNCH} and own not in others
    small = {"BLOCK_V": 256, "num_warps": 4}
    dtype = torch.float32 if row["bits"] == 32 else torch.bfloat16
    with _configurations.trial(
        "cross_entropy",
        lambda key: next(r for r in ROWS if key.items() <= r.items()) | small,
    ):
        problem = candidates.problem(row, dtype, DEVICE, small)
        answers = problem.answers()
    wide = [x.double() if x.is_floating_point() else x for x in problem.inputs]
    exact = problem.twin(*wide)
    assert len(problem.names) == len(answers) == len(exact)
    for got, want in zip(answers, exact):
        # two roundings to 8 bits, relative to the largest
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (1e-5 if row["bits"] == 32 else 2**-7)
