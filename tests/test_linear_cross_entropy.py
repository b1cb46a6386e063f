"""Linear cross-entropy beside parity: parts and chunks of the vocabulary, memory, bits, layouts."""

import functools
import gc
import warnings
import weakref

import pytest
import torch
from gaugeblock.kernels import _configurations, _loss, _product
from gaugeblock.kernels import _linear_cross_entropy as module
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.kernels.candidates import linear_cross_entropy as candidates
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.result import describe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = CATALOG["linear_cross_entropy"]
ROWS = _configurations.rows("linear_cross_entropy")
SPLIT = module._SPLIT.value
NO_BIAS = {"b": lambda b, dims, rng: None}
linear_cross_entropy = functools.partial(kernels.linear_cross_entropy, impl="triton")


def draw(M, C, V, dtype=torch.float32, seed=0):
    """x, w, targets (some ignored), b."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=generator) for s in ((M, C), (V, C), (V,)))
    targets = torch.randint(V, (M,), generator=generator)
    targets[1::3] = -100
    floating = ((t * s).to(DEVICE, dtype) for t, s in ((x, 1), (w, C**-0.5), (b, 1)))
    x, w, b = floating
    return x, w, targets.to(DEVICE), b


def gradients(x, w, targets, b=None, **options):
    """loss and the gradients of its sum times 3."""
    inputs = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    loss = linear_cross_entropy(*inputs[:2], targets, *inputs[2:], **options)
    return loss.detach(), *torch.autograd.grad(loss.sum() * 3, inputs)


def judge(case, dtype, layout="contiguous"):
    results = Expectation(OP, case, dtype).judge(TorchAdapter(DEVICE), linear_cross_entropy, layout)
    assert not [describe(r) for r in results if not r.passed]
    assert len(results) >= 3


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_configuration_of_the_table(architecture, bits, bias, monkeypatch):
    """Two tiles of rows, of the contraction and of each part of the vocabulary, all ragged."""
    monkeypatch.setattr(module, "architecture", lambda: architecture)
    rows = [r for r in ROWS if (r["architecture"], r["bits"]) == (architecture, bits)]
    used = []
    find = _configurations.find
    monkeypatch.setattr(module, "find", lambda op, **key: used.append(find(op, **key)) or used[-1])
    sizes = {n: max(r[f"BLOCK_{n}"] for r in rows) + 8 for n in "MNK"}
    case = Case(
        "configuration", M=sizes["M"], C=sizes["K"], V=SPLIT + sizes["N"], reduction="none",
        values={} if bias else NO_BIAS,
    )  # fmt: skip
    judge(case, "float32" if bits == 32 else "float16" if bias else "bfloat16")
    assert {r["kernel"] for r in used} == {r["kernel"] for r in rows} == {"forward", "dlogits"}
    assert all(r in rows for r in used)


@pytest.mark.parametrize("by", [-1, 0, 1])
@pytest.mark.parametrize("at", ["part", "chunk", "many_chunks"])
def test_vocabularies_that_end_about_a_part_or_a_chunk(at, by):
    tile = module._options("dlogits", torch.empty((1, 1), dtype=torch.bfloat16), None)["BLOCK_N"]
    V = {"part": 2 * SPLIT, "chunk": module._chunk(SPLIT, tile), "many_chunks": 25 * tile}[at] + by
    if at == "many_chunks":
        assert module._chunk(V, tile) == 2 * tile if by >= 0 else True
    values = NO_BIAS if by else {}
    judge(Case("edge", M=3, C=16, V=V, label_smoothing=0.1, values=values), "bfloat16")


def test_chunks_are_whole_tiles_and_a_24th():
    for V in (1, 33, 1000, 32000, 40478, 50257, 50304, 131072, 200019):
        for BLOCK_N in (32, 64, 128, 256):
            columns = module._chunk(V, BLOCK_N)
            assert columns % BLOCK_N == 0 and columns >= BLOCK_N
            assert columns == BLOCK_N or columns - BLOCK_N < V / 24
    for row in ROWS:
        assert SPLIT % row["BLOCK_N"] == 0


class Memory(TorchDispatchMode):
    """Bytes of the storages that are alive and not those given, and the most there were."""

    def __init__(self, *given):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet(x.untyped_storage() for x in given if x is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and func.namespace == "aten":
                self._count(x)
        return result

    def _count(self, x):
        storage = x.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.alive -= size


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_memory_beside_inputs_and_outputs_is_under_a_tenth_of_the_logits(
    bias, architecture, monkeypatch
):
    """GPT-2's head on 8,192 tokens, launchers on tensors without values."""
    for home in (module, _loss, _product):
        monkeypatch.setattr(home, "launch", lambda *args, **options: None)
    for home in (module, _product):
        monkeypatch.setattr(home, "architecture", lambda: architecture)
    M, C, V = 8192, 768, 50257
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        x, w, b = (torch.empty(s, dtype=torch.bfloat16) for s in ((M, C), (V, C), (V,)))
        targets = torch.empty((M,), dtype=torch.int64)
        b = b if bias else None
        gc.collect()
        with Memory(x, w, targets, b) as memory:
            losses, lse = module._forward(x, w, targets, b, -100, 0.1)
            forward_bytes = memory.most
        with Memory(x, w, targets, b, losses, lse) as memory:
            dx, dw, db = module._backward(losses, x, w, targets, b, lse, -100, 0.1)
            outputs = sum(t.untyped_storage().nbytes() for t in (dx, dw, db) if t is not None)
            backward_bytes = memory.most - outputs
    logits_bytes = 2 * M * V
    assert 0 < forward_bytes < logits_bytes / 50
    # dlogits of a chunk and dx in float32 are there, so that the count is one
    assert logits_bytes / 24 + 4 * M * C - 1 < backward_bytes < logits_bytes / 10


def test_a_row_depends_on_no_other_and_not_on_their_number():
    x, w, targets, b = draw(5, 40, SPLIT + 33, torch.bfloat16)
    found = {M: gradients(x[:M], w, targets[:M], b, reduction="none") for M in (1, 5)}
    # losses and dx are a row's, dw and db the sums
    for few, more in zip(found[1][:2], found[5][:2]):
        assert torch.equal(few, more[:1])
    other = x.clone()
    other[1:] *= 2
    changed = gradients(other, w, targets, b, reduction="none")
    for mine, all_rows in zip(changed[:2], found[5][:2]):
        assert torch.equal(mine[:1], all_rows[:1])
        assert not torch.equal(mine[2:], all_rows[2:])


# NumPy says where it meets a NaN, as the interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ignored_rows_give_nothing_whatever_they_hold():
    x, w, targets, b = draw(7, 16, 40)
    x[targets == -100] = float("nan")
    loss, dx, _, db = gradients(x, w, targets, b, label_smoothing=0.1)
    assert loss.isfinite() and dx.isfinite().all() and db.isfinite().all()
    assert (dx[targets == -100] == 0).all()
    assert (dx[targets != -100] != 0).any()


def test_heads_of_any_strides_give_the_same_bits():
    """Tied, untied, a transposed projection, slices: what a descriptor cannot read too."""
    x, w, targets, _ = draw(5, 40, 77, torch.float16)
    want = gradients(x, w, targets)
    wide = torch.randn(77, 2, 41, device=DEVICE).half()
    wide[:, 1, 1:] = w
    for head in (w.t().contiguous().t(), wide[:, 1, 1:]):
        assert not head.is_contiguous()
        for got, exact in zip(gradients(x, head, targets), want):
            assert torch.equal(got, exact)
    rows = x.t().contiguous().t()
    for got, exact in zip(gradients(rows, w, targets), want):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_leading_dimensions_and_a_tied_head(impl):
    fn = functools.partial(kernels.linear_cross_entropy, impl=impl)
    x, w, targets, b = draw(6, 16, 40)
    losses = fn(x.view(2, 3, 16), w, targets.view(2, 3), b, reduction="none")
    assert torch.equal(losses.view(6), fn(x, w, targets, b, reduction="none"))
    w.requires_grad_()
    tokens = targets.clamp(0, 39)
    fn(w[tokens], w, targets).backward()
    rows = w.detach()[tokens].requires_grad_()
    head = w.detach().clone().requires_grad_()
    fn(rows, head, targets).backward()
    want = head.grad.index_add(0, tokens, rows.grad)
    torch.testing.assert_close(w.grad, want, rtol=1e-5, atol=1e-7)


def test_on_a_machine_of_several_devices(monkeypatch):
    """Kernels run on the device of what they read, be it a tensor or a descriptor of one."""
    x, w, targets, _ = draw(3, 16, 40, torch.bfloat16)
    plain = gradients(x, w, targets)
    first, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: first.append(x) or device_of(x))
    assert all(map(torch.equal, gradients(x, w, targets), plain))
    assert len(first) > 4 and all(isinstance(x, torch.Tensor) for x in first)


def test_launches_follow_the_chunks():
    x, w, targets, _ = draw(3, 16, SPLIT + 9, torch.bfloat16)
    LAUNCHES.clear()
    gradients(x, w, targets)
    columns = module._chunk(len(w), module._options("dlogits", x, None)["BLOCK_N"])
    chunks = -(-len(w) // columns)
    assert chunks > 2
    assert LAUNCHES["_linear_cross_entropy_parts_kernel"] == 1
    assert LAUNCHES["_loss_merge_kernel"] == 1
    assert LAUNCHES["_linear_cross_entropy_dlogits_kernel"] == chunks
    assert LAUNCHES["_product_kernel"] == 2 * chunks


def test_gradcheck_in_float64():
    x, w, targets, b = (t.double() if t.is_floating_point() else t for t in draw(3, 4, 7))
    inputs = [t.requires_grad_() for t in (x, w, b)]
    for reduction in ("mean", "none"):
        fn = functools.partial(linear_cross_entropy, reduction=reduction, label_smoothing=0.2)
        assert torch.autograd.gradcheck(lambda x, w, b, fn=fn: fn(x, w, targets, b), inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_compiles_as_one_graph_with_the_same_bits(bias):
    x, w, targets, b = draw(3, 16, 40)
    b = b if bias else None
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = []
    for fn in (linear_cross_entropy, compiled):
        inputs = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
        loss = fn(*inputs[:2], targets, *inputs[2:])
        found.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for plain, traced in zip(*found):
        assert torch.equal(plain, traced)


def test_the_operators_without_a_bias_are_registered_as_torch_wants_them():
    x, w, targets, _ = draw(3, 16, 40)
    losses, lse = module._fwd_op(x, w, targets, None, -100, 0.1)
    x, w = x.requires_grad_(), w.requires_grad_()
    wanted = torch.library.opcheck(module._fwd_op, (x, w, targets, None, -100, 0.1))
    assert set(wanted.values()) == {"SUCCESS"}, wanted
    arguments = losses, x.detach(), w.detach(), targets, None, lse, -100, 0.1
    wanted = torch.library.opcheck(module._bwd_op, arguments)
    assert set(wanted.values()) == {"SUCCESS"}, wanted


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_short_targets_are_numbers_like_any(impl, dtype):
    """V and ignore_index are others in these dtypes."""
    fn = functools.partial(kernels.linear_cross_entropy, impl=impl)
    x, w, _, _ = draw(3, 1, 200)
    targets = torch.tensor([5, 100, 156 if dtype == torch.uint8 else 7], device=DEVICE)
    for ignored in (-100, 7, 5 - 2**16):
        want = fn(x, w, targets, ignore_index=ignored)
        assert torch.equal(fn(x, w, targets.to(dtype), ignore_index=ignored), want)


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("ignore_index", [None, 1.5])
def test_an_ignore_index_that_is_no_integer_is_refused(ignore_index, impl):
    x, w, targets, _ = draw(3, 16, 40)
    kind = type(ignore_index).__name__
    with pytest.raises(TypeError, match=f"^linear_cross_entropy: ignore_index must be an .*{kind}"):
        kernels.linear_cross_entropy(x, w, targets, ignore_index=ignore_index, impl=impl)
    with pytest.raises(TypeError, match=f"^cross_entropy: ignore_index must be an .*{kind}$"):
        kernels.cross_entropy(x, targets.clamp(max=9), ignore_index=ignore_index, impl=impl)


def test_an_empty_head_is_refused():
    x, w, targets, _ = draw(3, 16, 40)
    with pytest.raises(ValueError, match=r"w must have at least one row, got \(0, 16\)"):
        linear_cross_entropy(x, w[:0], targets)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['kernel']}-{r['architecture']}-{r['bits']}"
)
def test_what_tune_tries_is_right(row):
    own, *others = candidates.candidates(row)
    assert own == {name: row[name] for name in candidates.LAUNCH} and own not in others
    candidate = others[0]
    dtype = torch.float32 if row["bits"] == 32 else torch.bfloat16

    def choose(key):
        found = next(r for r in ROWS if key.items() <= r.items())
        return found | candidate if found["kernel"] == row["kernel"] else found

    with _configurations.trial("linear_cross_entropy", choose):
        problem = candidates.problem(row, dtype, DEVICE, candidate)
        answers = problem.answers()
    wide = [x.double() if x.is_floating_point() else x for x in problem.inputs]
    exact = problem.twin(*wide)
    assert len(problem.names) == len(answers) == len(exact)
    for got, want in zip(answers, exact):
        # dlogits and the result are rounded to 8 bits, relative to the largest
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (1e-5 if row["bits"] == 32 else 2**-7)
