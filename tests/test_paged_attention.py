"""What holds for paged attention beside parity: bits, pages, splits, clamps, registration."""

import functools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gaugeblock.kernels import _paged_attention as module
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.reference._paged_attention import paged_attention as reference
from torch._subclasses.fake_tensor import FakeTensorMode

from gaugeblock import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, HKV, TQ, D = 4, 2, 2, 16
paged_attention = functools.partial(kernels.paged_attention, impl="triton")


def random(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype).to(DEVICE)


def row(n, dtype=torch.float32, seed=0, heads=(H, HKV), Tq=TQ, head_dim=D):
    """A row's q (1, H, Tq, D) and its n keys and values (1, Hkv, n, D)."""
    h, hkv = heads
    shapes = (1, h, Tq, head_dim), (1, hkv, n, head_dim), (1, hkv, n, head_dim)
    return [random(*shape, seed=3 * seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def cached(rows, page, pages, spare=2, seed=0):
    """Inputs of `paged_attention` for rows (q, k, v), each with so many pages in its table.

    The pages that are used come in no order; NaN is where no key is, and the table's other entries
    name no page.
    """
    used = [-(-k.shape[2] // page) for _, k, _ in rows]
    order = np.random.default_rng(seed).permutation(sum(used) + spare).tolist()
    _, hkv, _, d = rows[0][1].shape
    blank = (len(order), hkv, page, d)
    k_pages, v_pages = (rows[0][1].new_full(blank, float("nan")) for _ in range(2))
    table = torch.full((len(rows), pages), -1, dtype=torch.int32)
    table[:, 1::2] = 2**31 - 1
    for b, (_, k, v) in enumerate(rows):
        for i in range(used[b]):
            table[b, i] = at = order.pop()
            for cache, x in ((k_pages, k), (v_pages, v)):
                some = x[0, :, i * page : (i + 1) * page]
                cache[at, :, : some.shape[1]] = some
    lengths = torch.tensor([k.shape[2] for _, k, _ in rows], dtype=torch.int32)
    q = torch.cat([q for q, _, _ in rows])
    return q, k_pages, v_pages, table.to(DEVICE), lengths.to(DEVICE)


def exact(inputs, **options):
    """The reference's o."""
    arrays = [x.cpu().double().numpy() if x.is_floating_point() else x.cpu() for x in inputs]
    return torch.from_numpy(reference(*arrays, **options)[0])


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 700, 9000])
def test_the_bits_of_a_row_depend_on_nothing_outside_it(n, dtype, window):
    if n == 9000:  # more than 32 splits of the least size
        mine, other = (row(m, dtype, i, heads=(1, 1), Tq=1) for i, m in enumerate((n, 40)))
    else:
        mine, other = (row(m, dtype, i) for i, m in enumerate((n, 1000)))
    pages = -(-n // 64)
    wide = max(pages, 16)
    alone = paged_attention(*cached([mine], 64, pages), window=window)
    assert alone.isfinite().all()
    more_pages = paged_attention(*cached([mine], 64, 4 * wide, spare=9), window=window)
    assert torch.equal(alone, more_pages)
    rows = [other, mine, [mine[0], *(x[:, :, :0] for x in mine[1:])], mine]
    batch = paged_attention(*cached(rows, 64, wide, seed=1), window=window)
    assert torch.equal(alone, batch[1:2])
    assert torch.equal(alone, batch[3:])
    assert not torch.equal(alone, batch[:1])
    assert (batch[2] == 0).all()


def test_bits_depend_on_neither_page_size_nor_order():
    """Within the two ways to look pages up; interpreted, across them as well."""
    rows = [row(700, torch.bfloat16), row(201, torch.bfloat16, seed=1)]
    whole, looked_up = [
        [
            paged_attention(*cached(rows, page, -(-700 // page), seed=seed), window=450)
            for page, seed in cases
        ]
        for cases in ([(64, 0), (64, 5), (128, 0), (704, 0)], [(16, 0), (16, 5), (7, 0), (1, 0)])
    ]
    assert whole[0].isfinite().all()
    for found in (whole, looked_up):
        assert all(torch.equal(found[0], o) for o in found[1:])
    if DEVICE == "cpu":
        assert torch.equal(whole[0], looked_up[0])


@pytest.mark.parametrize("page", [64, 16])
def test_what_no_query_sees_is_not_read(page):
    n, window = 300, 40
    q, k, v = row(n)
    first = n - TQ - window + 1
    hidden = [q, *(x.clone() for x in (k, v))]
    for x in hidden[1:]:
        x[:, :, :first] = float("nan")
    inputs = list(cached([hidden], page, 20))
    assert torch.equal(
        paged_attention(*inputs, window=window),
        paged_attention(*cached([(q, k, v)], page, 20), window=window),
    )
    assert paged_attention(*inputs, window=window + 1)[:, :, 0].isnan().all()
    # pages that the window has passed may be anyone's; the public function checks them on a CPU
    inputs[3][:, : first // page] = 2**31 - 1
    o = module._forward(*inputs, window, D**-0.5)
    assert torch.equal(o, paged_attention(*cached([(q, k, v)], page, 20), window=window))


@pytest.mark.parametrize("page", [64, 16])
def test_wrong_indices_are_clamped(page):
    """Where values are not checked, they touch no memory outside the tensors."""
    q, k_pages, v_pages, table, lengths = cached([row(200), row(100, seed=1)], page, 20)
    k_pages, v_pages = k_pages.nan_to_num(0.5), v_pages.nan_to_num(0.5)
    P = len(k_pages)
    wrong = table.clone().long()
    wrong[0, 0], wrong[1, 0] = -(2**40), 2**40 + 1
    right = wrong.clamp(0, P - 1)
    for n, clamped in ((lengths.long(), lengths), ([-(2**40), 2**40], [0, 20 * page])):
        n, clamped = (torch.as_tensor(x, device=DEVICE) for x in (n, clamped))
        for run in (module._forward, lambda *x: module._eager(*x[:5], window=x[5], scale=x[6])):
            o = run(q, k_pages, v_pages, wrong, n, None, 0.25)
            assert o.isfinite().all()
            assert torch.equal(o, run(q, k_pages, v_pages, right, clamped, None, 0.25))
            # no page at all
            assert (run(q, k_pages[:0], v_pages[:0], wrong, n, None, 0.25) == 0).all()


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(("heads", "Tq"), [((8, 2), 40), ((6, 1), 1), ((1, 1), 70)])
def test_many_queries(heads, Tq, window, impl):
    """More rows than a tile has, and more queries than keys: the first ones see nothing."""
    rows = [row(n, seed=i, heads=heads, Tq=Tq) for i, n in enumerate((600, 37, 0))]
    for q, k, _ in rows:
        q[:, :, : max(Tq - k.shape[2], 0)] = float("nan")
    inputs = cached(rows, 16, 40)
    o = kernels.paged_attention(*inputs, window=window, impl=impl)
    torch.testing.assert_close(o.cpu().double(), exact(inputs, window=window), rtol=1e-5, atol=1e-5)
    assert (o[2] == 0).all()


def test_float64_keeps_its_digits():
    inputs = cached([row(300, torch.float64)], 16, 20)
    # the product with log2(e) passes in float32: one that loses nothing there
    scale = 0.25 * math.log(2)
    o = paged_attention(*inputs, scale=scale)
    torch.testing.assert_close(o.cpu(), exact(inputs, scale=scale), rtol=1e-12, atol=1e-12)


@triton.jit
def _splits_kernel(
    lengths_ptr, out_ptr, capacity, Tq, window, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0)
    n, first, size = module._splits(lengths_ptr, b, capacity, Tq, window, BLOCK_N, SPLITS)
    tl.store(out_ptr + 2 * b, tl.cdiv(n - first, size))
    tl.store(out_ptr + 2 * b + 1, first)


@pytest.mark.parametrize("SPLITS", [32, 4, 1])
@pytest.mark.parametrize(("Tq", "window"), [(1, None), (3, None), (1, 1), (1, 257), (5, 450)])
def test_the_grid_covers_every_split_of_every_length(Tq, window, SPLITS):
    most = {}
    for capacity in (1, 16, 255, 256, 257, 8192, 8193, 40_000):
        lengths = {0, 1, Tq, *range(255, 600, 43), *(256 * i + j for i in (30, 32) for j in (0, 1))}
        lengths = [n for n in lengths if n < capacity] + [capacity]
        shown = capacity if window is None else min(window, capacity)
        out = torch.zeros(len(lengths), 2, dtype=torch.int32, device=DEVICE)
        lengths = torch.tensor(lengths, device=DEVICE)
        _splits_kernel[(len(lengths),)](
            lengths, out, capacity, Tq, shown, BLOCK_N=64, SPLITS=SPLITS
        )
        needed, first = out.T
        most[capacity] = module._most_splits(capacity, Tq, shown, 64, SPLITS)
        assert needed.max() <= most[capacity] <= SPLITS
        assert (first % 64 == 0).all()
        assert (first <= (lengths - Tq - shown + 1).clamp(min=0)).all()
    assert most[1] == 1
    if window is None:
        assert most[40_000] == SPLITS


def test_configurations_are_powers_of_two_that_cover_the_head():
    for head_dim in (1, 16, 33, 64, 65, 128, 200, 256):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for rows in (1, 2, 16, 17, 64, 100, 3000):
                options = module._configuration(rows, head_dim, dtype)
                for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"):
                    assert options[name] >= 16 and options[name].bit_count() == 1
                assert options["BLOCK_D"] >= head_dim
                assert options["WHOLE_D"] == (options["BLOCK_D"] == head_dim)
                # splits begin where tiles do
                assert module._SPLIT.value % options["BLOCK_N"] == 0
                # scratch does not grow with the queries
                tiles, splits = -(-rows // options["BLOCK_M"]), options["SPLITS"]
                assert splits.bit_count() == 1
                assert splits == 1 or tiles * splits <= module._MOST_SPLITS
                assert tiles > 1 or splits == module._MOST_SPLITS


def test_strides():
    inputs = cached([row(100), row(30, seed=1)], 16, 7)
    o = paged_attention(*inputs)
    q, k_pages, v_pages, table, lengths = inputs
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k_pages.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([v_pages, v_pages], 3)[:, :, :, 1],
        torch.stack([table, table], 2)[:, :, 1],
        torch.stack([lengths * 0, lengths], 1)[:, 1],
    )
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(o, paged_attention(*views))
    copied = [x.mT.contiguous().mT for x in inputs[:3]]
    assert all(x.stride(-1) != 1 for x in copied)
    assert torch.equal(o, paged_attention(*copied, table.long(), lengths.long()))


def test_two_launches_a_call():
    inputs = cached([row(100)], 16, 7)
    LAUNCHES.clear()
    paged_attention(*inputs)
    assert LAUNCHES == {"_paged_attention_fwd_kernel": 1, "_paged_attention_merge_kernel": 1}


@pytest.mark.parametrize("empty", ["B", "Tq", "keys", "pages", "P"])
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_nothing_to_attend_gives_zeros(empty, impl):
    q, k_pages, v_pages, table, lengths = cached([row(30), row(9, seed=1)], 16, 3)
    if empty == "B":
        q, table, lengths = q[:0], table[:0], lengths[:0]
    elif empty == "Tq":
        q = q[:, :, :0]
    else:
        q, lengths = q * float("nan"), lengths * 0
        table = table[:, :0] if empty == "pages" else table
        k_pages, v_pages = (x[:0] if empty == "P" else x for x in (k_pages, v_pages))
    o = kernels.paged_attention(q, k_pages, v_pages, table, lengths, impl=impl)
    assert torch.equal(o, torch.zeros(q.shape, device=DEVICE))


def test_the_operator_is_registered_as_torch_wants_it():
    inputs = cached([row(100), row(30, seed=1)], 16, 7)
    inputs = [x.nan_to_num() if x.is_floating_point() else x for x in inputs]
    wanted = torch.library.opcheck(module._fwd_op, (*inputs, 20, 0.25))
    assert set(wanted.values()) == {"SUCCESS"}, wanted


def test_there_is_no_gradient():
    q, *rest = cached([row(20)], 16, 2)
    o = paged_attention(q.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        o.sum().backward()


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_compiles_as_one_graph_with_the_same_bits(impl):
    inputs = cached([row(100), row(30, seed=1)], 16, 7)
    fn = functools.partial(kernels.paged_attention, window=20, impl=impl)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(fn(*inputs), compiled(*inputs))


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_tensors_without_values(impl):
    inputs = cached([row(100), row(30, seed=1)], 16, 7)
    if DEVICE == "cpu":
        o = kernels.paged_attention(*(x.to("meta") for x in inputs), impl=impl)
        assert o.shape == inputs[0].shape and o.is_meta
    halves = [x.half() if x.is_floating_point() else x for x in inputs]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in halves]
        o = kernels.paged_attention(*fakes, impl=impl)
    assert o.shape == inputs[0].shape and o.dtype == torch.float16 and o.device == fakes[0].device


def _in_place(name, at, value):
    def change(inputs):
        inputs[name][at] = value

    return change


def _replaced(name, change):
    def replace(inputs):
        inputs[name] = change(inputs[name])

    return replace


WRONG = {
    "length_over": (_in_place("lengths", 1, 113), r"lengths must lie in 0 … pages·page = 112, got"),
    "length_under": (_in_place("lengths", 0, -1), "lengths must lie in .* got -1"),
    "page_over": (
        _in_place("table", (1, 1), 11),
        r"block_table must lie in 0 … P − 1 = 10, got 11",
    ),
    "page_under": (_in_place("table", (0, 6), -1), "block_table must lie in .* got -1"),
    "table_rows": (_replaced("table", lambda x: x[:1]), "block_table must have shape"),
    "lengths_rows": (_replaced("lengths", lambda x: x[:1]), "lengths must have shape"),
    "key_heads": (_replaced("q", lambda x: x[:, :3]), "H must be a multiple of Hkv, got H = 3"),
    "q_dtype": (_replaced("q", torch.Tensor.half), "k_pages must have q's dtype"),
    "table_dtype": (_replaced("table", torch.Tensor.float), "block_table must be int"),
    "lengths_dtype": (_replaced("lengths", torch.Tensor.bool), "lengths must be int"),
    "lengths_list": (_replaced("lengths", torch.Tensor.tolist), "lengths must be a torch tensor"),
    "lengths_device": (_replaced("lengths", lambda x: x.to("meta")), "lengths must be on q's"),
}
TYPE_ERRORS = {"q_dtype", "table_dtype", "lengths_dtype", "lengths_list"}


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_in_one_line(name, impl):
    if DEVICE == "cuda" and name.startswith(("length_", "page_")):
        pytest.skip("values on a GPU are not looked at")
    change, message = WRONG[name]
    names = ("q", "k_pages", "v_pages", "table", "lengths")
    inputs = dict(zip(names, cached([row(100), row(30, seed=1)], 16, 7)))
    change(inputs)
    with pytest.raises(TypeError if name in TYPE_ERRORS else ValueError, match=message) as raised:
        kernels.paged_attention(*inputs.values(), impl=impl)
    assert str(raised.value).startswith("paged_attention: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_wrong_options_are_refused(impl):
    inputs = cached([row(20)], 16, 2)
    with pytest.raises(ValueError, match="window must be at least 1"):
        kernels.paged_attention(*inputs, window=0, impl=impl)
    wide = cached([row(20, head_dim=257)], 16, 2)
    if impl == "eager":
        assert kernels.paged_attention(*wide, impl=impl).isfinite().all()
    else:
        with pytest.raises(ValueError, match="D must be at most 256, got 257; use impl='eager'"):
            kernels.paged_attention(*wide, impl=impl)
