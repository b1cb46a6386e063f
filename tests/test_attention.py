"""The attention kernels beside parity: tiles, configurations, packing, dropout, memory, limits."""

import functools
import importlib
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gaugeblock.kernels import _attention, _configurations, _philox
from gaugeblock.kernels._attention import configuration, launchers, masks
from gaugeblock.kernels._launch import INTERPRETED
from gaugeblock.reference import _philox as reference_philox
from gaugeblock.reference._attention import visible_keys
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case
from gaugeblock.reference.oracle.adapters import TorchAdapter
from gaugeblock.reference.oracle.expectation import Expectation
from gaugeblock.reference.oracle.result import describe

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = CATALOG["attention"]
attention = functools.partial(kernels.attention, impl="triton")


def draw(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def qkv(B, H, Hkv, Tq, Tk, D, dtype=torch.float32):
    return draw((B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D), dtype=dtype)


def everything(q, k, v, **options):
    """o, lse and the gradients of q, k and v."""
    o, lse = attention(q, k, v, return_lse=True, **options)
    (do,) = draw(o.shape, dtype=o.dtype, seed=1)
    return o, lse, *torch.autograd.grad(o, (q, k, v), do)


@triton.jit(do_not_specialize=["window", "global_tokens"])
def _walk_kernel(
    out_ptr, T, n, shift, window, global_tokens,
    CAUSAL: tl.constexpr, OVER_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Counts how often the program's tile meets each other tile: open ones by 1, masked by 100."""
    block = tl.program_id(0)
    BLOCK: tl.constexpr = BLOCK_M if OVER_KEYS else BLOCK_N
    if OVER_KEYS:
        first_open, last_open, head, left, first, masked = masks.query_walk(
            block, T, n, shift, window, global_tokens, CAUSAL, BLOCK_M, BLOCK_N
        )
    else:
        _, _, _, first_open, last_open, head, left, first, masked = masks.key_walk(
            block, T, n, shift, window, global_tokens, CAUSAL, BLOCK_M, BLOCK_N
        )
    for start in range(first_open, last_open, BLOCK):
        met = out_ptr + block * 64 + start // BLOCK
        tl.store(met, tl.load(met) + 1)
    for number in range(0, masked):
        start = masks.masked_start(number, last_open, head, left, first, BLOCK)
        met = out_ptr + block * 64 + start // BLOCK
        tl.store(met, tl.load(met) + 100)


def walks():
    """(Tq, Tk, options, tiles) of many masks, by a fixed seed."""
    rng = np.random.default_rng(0)
    for number in range(150):
        Tq, Tk = (int(x) for x in rng.integers(1, 150, 2))
        options = {
            "causal": bool(number % 2),
            "align": ("bottom_right", "top_left")[number // 2 % 2],
        }
        if number % 3:
            options["window"] = int(rng.integers(1, 80))
            options["global_tokens"] = int(rng.integers(0, 3) * rng.integers(1, 40))
        yield Tq, Tk, options, (16, 32) if number % 5 else (32, 16)


@pytest.mark.parametrize("over_keys", [False, True])
def test_the_walk_meets_every_tile_that_shows_something_once_and_no_other(over_keys):
    for Tq, Tk, options, (BLOCK_M, BLOCK_N) in walks():
        shown = visible_keys(Tq, Tk, **options)[0, 0]
        causal, window = options["causal"], options.get("window")
        shift = Tk - Tq if options["align"] == "bottom_right" else 0
        # one more than there are, as packed documents have
        blocks = 1 + (-(-Tk // BLOCK_N) if over_keys else -(-Tq // BLOCK_M))
        met = torch.zeros(blocks, 64, dtype=torch.int32, device=DEVICE)
        _walk_kernel[(blocks,)](
            met, Tq, Tk, shift, window, options.get("global_tokens") or None,
            CAUSAL=causal, OVER_KEYS=over_keys, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        assert not met[-1].any()
        met = (met.T if over_keys else met).cpu().numpy()
        for m, n in itertools.product(range(-(-Tq // BLOCK_M)), range(-(-Tk // BLOCK_N))):
            tile = shown[m * BLOCK_M : (m + 1) * BLOCK_M, n * BLOCK_N : (n + 1) * BLOCK_N]
            # tiles that reach beyond the last key need the mask; beyond the last query they do not
            # where queries lie along the tile that is held
            whole = (n + 1) * BLOCK_N <= Tk and (not over_keys or (m + 1) * BLOCK_M <= Tq)
            far = window is not None and options["global_tokens"] > n * BLOCK_N
            want = 0 if not tile.any() else 1 if tile.all() and whole else 100
            # a tile with global keys may be masked where it need not be
            allowed = {want, 100} if far and want else {want}
            assert met[m, n] in allowed, (Tq, Tk, options, m, n, met[m, n], want)


TILES = sorted(
    {
        tuple(row[k] for k in ("head_dim", "bits", "causal", "queries", "architecture"))
        for row in _configurations.rows("attention")
    }
)


@pytest.mark.parametrize(("head_dim", "bits", "causal", "queries", "architecture"), TILES)
def test_every_configuration_of_the_table(
    head_dim, bits, causal, queries, architecture, monkeypatch
):
    """Each on more rows and keys than its largest tile has."""
    monkeypatch.setattr(configuration, "architecture", lambda: architecture)
    rows = [
        row
        for row in _configurations.rows("attention")
        if all(row[k] == v for k, v in (
            ("head_dim", head_dim), ("bits", bits), ("causal", causal), ("queries", queries),
            ("architecture", architecture),
        ))
    ]  # fmt: skip
    assert {row["kernel"] for row in rows} == {"forward", "dkdv", "dq"}
    Tq = 13 if queries == "few" else max(row["BLOCK_M"] for row in rows) + 21
    Tk = 2 * max(row["BLOCK_N"] for row in rows) + 9
    case = Case("configuration", B=1, H=2, Hkv=2, Tq=Tq, Tk=Tk, D=head_dim, causal=causal)
    dtype = "float32" if bits == 32 else "float16" if causal else "bfloat16"
    used = []
    find = _configurations.find
    monkeypatch.setattr(
        configuration, "find", lambda op, **key: used.append(find(op, **key)) or used[-1]
    )
    results = Expectation(OP, case, dtype).judge(TorchAdapter(DEVICE), attention)
    assert not [describe(r) for r in results if not r.passed]
    assert {row["kernel"]: row for row in used} == {row["kernel"]: row for row in rows}


def test_chips_without_rows_use_those_of_one_that_can_do_the_same(monkeypatch):
    from types import SimpleNamespace as Target

    driver = triton.runtime.driver
    monkeypatch.setattr(_configurations, "INTERPRETED", False)
    for backend, arch, want in [
        ("cuda", 80, "sm_80"), ("cuda", 86, "sm_80"), ("cuda", 89, "sm_80"), ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_90"), ("cuda", 120, "sm_80"), ("hip", "gfx942", "sm_80"),
    ]:  # fmt: skip
        target = Target(backend=backend, arch=arch)
        active = Target(get_current_target=lambda target=target: target)
        monkeypatch.setattr(type(driver), "active", active, raising=False)
        assert _configurations.architecture() == want


def test_descriptors_and_pointers_give_the_same_bits():
    if not INTERPRETED and _configurations.architecture() != "sm_90":
        pytest.skip("a GPU without descriptors cannot take them")
    q, k, v = qkv(2, 4, 2, 150, 170, 40, torch.float16)
    by_descriptor = everything(q, k, v, causal=True)

    def pointers(key):
        return {**_configurations._find("attention", **key), "TMA": False}

    with _configurations.trial("attention", pointers):
        by_pointer = everything(q, k, v, causal=True)
    for a, b in zip(by_descriptor, by_pointer):
        assert torch.equal(a, b)


def test_a_tensor_that_no_descriptor_can_describe_is_read_by_pointers():
    x = torch.zeros(2, 3, 5, 40, dtype=torch.float16)
    assert configuration.descriptor(x, 16, 64) is not x
    assert configuration.descriptor(x[..., 1:], 16, 64).data_ptr() == x[..., 1:].data_ptr()
    for view in (x[..., :39][:, :, :, :].contiguous(), x[:1].expand(2, 3, 5, 40), x[:0]):
        assert configuration.descriptor(view, 16, 64) is view
    # the stride of a dimension of one is never used
    one = torch.zeros(40 * 15 + 3, dtype=torch.float16)[: 40 * 15].as_strided(
        (1, 3, 5, 40), (7, 200, 40, 1)
    )
    assert configuration.descriptor(one, 16, 64) is not one


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 20, "global_tokens": 3}])
@pytest.mark.parametrize("Hkv", [2, 1])
def test_a_document_is_bit_for_bit_what_it_is_alone(options, Hkv):
    """dk and dv where both are walked in the same tiles, which groups of heads always are."""
    starts = [0, 1, 1, 38, 170]
    q, k, v = qkv(1, 2, Hkv, 170, 170, 8, torch.float16)
    packed = everything(q, k, v, cu_seqlens=torch.tensor(starts, device=DEVICE), **options)
    (do,) = draw(q.shape, dtype=q.dtype, seed=1)
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        part = [x.detach()[:, :, begin:end].requires_grad_() for x in (q, k, v)]
        o, lse = attention(*part, return_lse=True, **options)
        alone = o, lse, *torch.autograd.grad(o, part, do[:, :, begin:end])
        same = alone if Hkv < q.shape[1] or options.get("window") else alone[:3]
        for a, b in zip(packed, same):
            assert torch.equal(a[:, :, begin:end], b)


def test_a_short_row_is_bit_for_bit_what_its_keys_alone_give():
    q, k, v = qkv(3, 2, 2, 70, 150, 8)
    lengths = [150, 0, 77]
    together = everything(q, k, v, causal=True, lengths=lengths)
    (do,) = draw(q.shape, seed=1)
    for b, n in ((0, 150), (2, 77)):
        part = [q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]]
        part = [x.detach().requires_grad_() for x in part]
        o, lse = attention(*part, causal=True, return_lse=True)
        alone = o, lse, *torch.autograd.grad(o, part, do[b : b + 1])
        for a, x in zip(together, alone):
            assert torch.equal(a[b : b + 1, :, : x.shape[2]], x)


def test_wrong_numbers_on_the_device_do_not_lead_out_of_the_tensors(monkeypatch):
    """As on a GPU, where they are not read beforehand."""
    monkeypatch.setattr(_attention, "readable", lambda tensor: False)
    q, k, v = qkv(1, 1, 1, 40, 40, 8)
    for numbers in ([0, 1000], [-70, 40], [0, 30, 10, 40], [90, 20]):
        o = attention(q, k, v, causal=True, cu_seqlens=torch.tensor(numbers, device=DEVICE))
        assert o.shape == q.shape
    longest = attention(q, k, v, lengths=torch.tensor([40], device=DEVICE))
    assert torch.equal(attention(q, k, v, lengths=torch.tensor([99], device=DEVICE)), longest)
    none = attention(q, k, v, lengths=torch.tensor([-3], device=DEVICE))
    assert not none.any()


@pytest.mark.parametrize("numbers", [[0, 12], [5, 20], [4, 9]])
def test_rows_that_no_document_has_are_written_all_the_same(numbers, monkeypatch):
    monkeypatch.setattr(_attention, "readable", lambda tensor: False)
    q, k, v = qkv(1, 1, 1, 20, 20, 8)
    torch.use_deterministic_algorithms(True)
    try:
        # torch fills what it allocates with NaN
        found = everything(q, k, v, cu_seqlens=torch.tensor(numbers, device=DEVICE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in found)


def test_lengths_may_have_strides():
    q, k, v = qkv(2, 1, 1, 9, 20, 8)
    pairs = torch.tensor([[7, 20], [9, 20]], device=DEVICE)
    for lengths in (pairs[:, 0], pairs[:1, 0].expand(2)):
        given = everything(q, k, v, lengths=lengths)
        for a, b in zip(given, everything(q, k, v, lengths=lengths.tolist())):
            assert torch.equal(a, b)
    starts = torch.tensor([[0, 3], [4, 9], [20, 8]], device=DEVICE)[:, 0]
    q, k, v = qkv(1, 1, 1, 20, 20, 8)
    packed = attention(q, k, v, cu_seqlens=starts)
    assert torch.equal(packed, attention(q, k, v, cu_seqlens=[0, 4, 20]))


# NumPy's products warn of infinities, which are meant here
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_whole_tile_of_infinitely_small_scores_leaves_the_others():
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 32, 300, 8))
    q = q.abs() + 0.1
    k[:, :, :128, 0] = -torch.inf
    rest = attention(q, k[:, :, 128:], v[:, :, 128:])
    torch.testing.assert_close(attention(q, k, v), rest)


@pytest.mark.parametrize("scale", [1e-47, -1e-47, 1e-39])
def test_a_scale_that_float32_does_not_hold_is_none_at_all(scale):
    q, k, v = qkv(1, 1, 1, 20, 40, 8)
    for a, b in zip(
        everything(q, k, v, causal=True, scale=scale), everything(q, k, v, causal=True, scale=0.0)
    ):
        torch.testing.assert_close(a, b)


def test_no_heads_read_no_keys():
    q, k, v = qkv(2, 0, 1, 4, 5, 8)
    o, lse, dq, dk, dv = everything(q, k, v)
    assert o.shape == dq.shape == q.shape and lse.numel() == 0
    assert not dk.any() and not dv.any()


def test_a_seed_is_one_symbol_to_the_compiler():
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 8, 8, 4))

    def fn(q, k, v, seed):
        return kernels.attention(q, k, v, dropout=0.5, seed=seed, impl="eager")

    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    for seed in range(12):
        assert torch.equal(compiled(q, k, v, seed), fn(q, k, v, seed))


@triton.jit
def _kept_kernel(out_ptr, first, seed, least, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, _philox.kept(first + offs.to(tl.int64), seed, least))


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**45 + 5])
def test_dropout_keeps_what_the_reference_keeps(seed, first):
    index = np.arange(first, first + 256)
    for p in (1e-9, 0.1, 0.5, 0.9999, 1.0):
        want = torch.from_numpy(reference_philox.keep_mask(index, p, seed))
        least, number = _philox.threshold(p), _philox.signed(seed)
        got = torch.empty(256, dtype=torch.bool, device=DEVICE)
        _kept_kernel[(1,)](got, first, number, least, N=256)
        assert torch.equal(got.cpu(), want)
        assert torch.equal(_philox.keep_mask(torch.from_numpy(index), p, number), want)


def test_dropout_of_everything_leaves_nothing_and_seeds_differ():
    q, k, v = qkv(1, 2, 2, 20, 20, 8)
    assert not any(x.any() for i, x in enumerate(everything(q, k, v, dropout=1.0)) if i != 1)
    runs = [attention(q, k, v, dropout=0.5, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])


FEATURES = [
    {"causal": True, "window": 9, "global_tokens": 2},
    {"causal": True, "lengths": (11, 37)},
    {"dropout": 0.3, "seed": 5},
]


@pytest.mark.parametrize("options", FEATURES, ids=lambda options: "-".join(options))
def test_registration_and_tracing_with_options(options):
    q, k, v = qkv(2, 2, 1, 20, 37, 8)
    if "lengths" in options:
        options = options | {"lengths": torch.tensor(options["lengths"], device=DEVICE)}
    arguments = (
        q, k, v, options.get("lengths"), None, options.get("causal", False), True,
        options.get("window"), options.get("global_tokens", 0), 0.3, options.get("dropout", 0.0),
        options.get("seed", 0), "ieee",
    )  # fmt: skip
    wanted = torch.library.opcheck(torch.ops.gaugeblock.attention_fwd.default, arguments)
    assert set(wanted.values()) == {"SUCCESS"}, wanted
    fn = functools.partial(attention, scale=0.3, return_lse=True, **options)
    plain, traced = fn(q, k, v), torch.compile(fn, fullgraph=True, backend="aot_eager")(q, k, v)
    for a, b in zip(plain, traced):
        assert torch.equal(a, b)
    do = torch.ones_like(plain[0])
    for a, b in zip(*(torch.autograd.grad(y[0], (q, k, v), do) for y in (plain, traced))):
        assert torch.equal(a, b)


def test_tensors_without_storage_have_shapes():
    q, k, v = (torch.empty(s, device="meta") for s in ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)))
    o, lse = torch.ops.gaugeblock.attention_fwd(
        q, k, v, None, None, True, True, None, 0, 0.3, 0.0, 0, "ieee"
    )
    assert (o.shape, lse.shape, o.device.type) == (q.shape, (2, 4, 5), "meta")
    assert kernels.attention(q, k, v, impl="eager").shape == q.shape


def test_a_module_may_be_imported_twice():
    q, k, v = qkv(1, 1, 1, 5, 5, 8)
    before = attention(q, k, v)
    again = importlib.reload(_attention)
    assert torch.equal(again.attention(q, k, v, impl="triton"), before)


def test_a_last_dimension_that_is_not_contiguous_is_copied():
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    for a, b in zip(everything(q, k, v), everything(*turned)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 20}, {"dropout": 0.5}])
def test_nothing_as_large_as_the_scores_is_allocated(options):
    Tq, Tk = 67, 131
    arguments = {
        "causal": False, "bottom_right": True, "window": None, "global_tokens": 0, "scale": 0.5,
        "dropout": 0.0, "seed": 0, "precision": "ieee",
    } | options  # fmt: skip
    q, k, v = (x.detach() for x in qkv(1, 1, 1, Tq, Tk, 4))
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        o, lse = launchers.forward(q, k, v, None, None, **arguments)
        launchers.backward(torch.ones_like(o), None, q, k, v, o, lse, None, None, **arguments)
    assert len(sizes) >= 6
    assert max(sizes) < Tq * Tk


def test_the_grid_covers_every_document_at_any_split():
    rng = np.random.default_rng(0)
    for block, _ in itertools.product((16, 64, 128), range(50)):
        starts = np.sort(rng.integers(0, 400, rng.integers(1, 9)))
        starts = torch.tensor([0, *starts.tolist(), 400])
        slots = starts // block + torch.arange(len(starts))
        tiles = -(-starts.diff() // block)
        assert (slots.diff() >= tiles).all()
        assert slots[-1] == launchers.programs(400, block, starts)


def test_sections_hold_at_least_one_head_and_at_most_all():
    for pairs, sharing, T, D in itertools.product(
        (1, 7, 384), (1, 4), (1, 4096, 1 << 20), (1, 256)
    ):
        x = torch.empty(1, 1, T, D, dtype=torch.float16, device="meta")
        assert 1 <= configuration.section(pairs, sharing, x) <= pairs


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device with 60 GB")
@pytest.mark.parametrize("layout", ["heads_first", "rows_first"])
def test_more_elements_than_int32_counts(layout):
    """The last head of tensors of more than 2^31 elements, against itself alone."""
    H, T, D = 66, 1 << 19, 64
    shape, turn = ((1, H, T, D), lambda x: x) if layout == "heads_first" else (
        (1, T, H, D), lambda x: x.transpose(1, 2)
    )  # fmt: skip
    whole = [
        torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for _ in range(3)
    ]
    assert whole[0].numel() > 2**31
    options = {"causal": True, "window": 96}
    o = attention(*map(turn, whole), **options)
    do = torch.randn_like(o)
    gradients = [turn(x) for x in torch.autograd.grad(o, whole, do)]
    last = [turn(x)[:, -1:].detach().clone().requires_grad_() for x in whole]
    alone = attention(*last, **options)
    assert torch.equal(o[:, -1:], alone)
    for a, b in zip(gradients, torch.autograd.grad(alone, last, do[:, -1:])):
        assert torch.equal(a[:, -1:], b)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_thousand_repeats_on_the_gpu_are_bitwise_equal():
    q, k, v = qkv(4, 12, 12, 1024, 1024, 64, torch.bfloat16)
    first = everything(q, k, v, causal=True)
    for _ in range(1000):
        for a, b in zip(first, everything(q, k, v, causal=True)):
            assert torch.equal(a, b)
