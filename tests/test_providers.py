"""Who is timed: every provider that can run here is right, and says what it cannot do."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gaugeblock.benchmarks import providers
from gaugeblock.benchmarks.providers import (
    OURS,
    Provider,
    Unavailable,
    cublaslt,
    flash_attn,
    library,
    load,
    torch_compile,
    torch_eager,
    transformer_engine,
)
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle import Case, check

from gaugeblock import kernels
from tests.helpers import python

MODULES = providers._modules()
NAMES = [name for module in MODULES for name in module.NAMES]
# torch's own, while it imports its compiler
quiet = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
# seconds for every shape
COMPILED = {"flex_attention", "torch_compile"}
ON_A_CPU = (
    OURS,
    "torch_eager",
    "torch_sdpa_math",
    "torch_sdpa_flash",
    "torch_fused_adamw",
    "numpy_reference",
    "jax",
)
CASES = {
    "embedding": ("odd",),
    "linear": ("odd",),
    "layer_norm": ("odd_row", "eps"),
    "residual_layer_norm": ("odd_row",),
    "attention": (
        "full",
        "causal",
        "one_query",
        "grouped_heads",
        "lse",
        "top_left",
        "window",
        "window_both_sides",
        "scale_zero",
        "documents",
    ),
    "paged_attention": ("several_queries",),
    "ffn": ("odd", "erf", "relu"),
    "cross_entropy": ("odd", "none", "smoothed_ignored", "rank_three"),
    "linear_cross_entropy": ("odd", "no_bias", "sum"),
    "dropout": ("odd",),
    "adamw": ("odd", "first_step"),
    "adam": ("odd", "first_step"),
    "additive_attention": ("odd",),
    "sample": ("odd", "greedy", "top_p_small", "all_filters"),
}


def provider(name, device="cpu"):
    """A provider, or a skip with the reason where its library is not here."""
    found, missing = load(device, [name])
    if not found:
        pytest.skip(f"{name} {missing[name]}")
    (one,) = found
    return one


def case_of(op, name):
    return next(case for case in CATALOG[op].cases if case.name == name)


def wrong(fn, op, case, direction):
    """What the oracle says against a function, over contiguous tensors."""
    report = check(
        replace(CATALOG[op], cases=[case]), fn, backward=direction == "bwd", memory=False,
        layouts=("contiguous",),
    )  # fmt: skip
    # something was compared: outputs, and gradients where they are asked for
    fewest = 1 if direction == "fwd" else 2
    return report.failures if len(report.results) >= fewest else ["nothing was compared"]


def points(one, cases=CASES):
    """(op, case, direction) of the small cases that a provider takes."""
    return [
        (op, case, direction)
        for op in one.ops
        for case in (case_of(op, name) for name in cases.get(op, ()))
        for direction in (("fwd", "bwd") if CATALOG[op].differentiable() else ("fwd",))
        if one.cannot(CATALOG[op], case, "float32", direction) is None
    ]


def test_a_file_says_whom_it_holds():
    assert len(set(NAMES)) == len(NAMES)
    for module in MODULES:
        assert module.NAMES
        assert callable(module.load)
    for name in set(NAMES) - {OURS}:
        assert "gaugeblock" not in name
        assert "triton" not in name


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_provider_is_right_where_it_says_that_it_can(name, subtests):
    one = provider(name)
    assert (one.name, bool(one.version)) == (name, True)
    taken = points(one)
    assert {op for op, _, _ in taken} == set(one.ops)
    for op, case, direction in taken:
        with subtests.test(op=op, case=case.name, direction=direction):
            assert not wrong(one.ops[op], op, case, direction)


@quiet
def test_a_compiled_function_is_right():
    one = provider("torch_compile")
    assert not wrong(one.ops["layer_norm"], "layer_norm", case_of("layer_norm", "odd_row"), "fwd")


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED))
def test_a_compiled_provider_is_right_for_every_op(name, subtests):
    one = provider(name)
    taken = points(one)
    assert {op for op, _, _ in taken} == set(one.ops)
    for op, case, direction in taken:
        with subtests.test(op=op, case=case.name, direction=direction):
            assert not wrong(one.ops[op], op, case, direction)


def test_compiled_functions_do_not_fall_back_past_dynamos_limit():
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        assert getattr(torch._dynamo.config, limit) >= 8
    torch_compile.compiled(torch_compile.FUNCTIONS["linear"])
    suite = sum("bench" in case.tags for op in CATALOG.values() for case in op.cases)
    # twice: with and without gradients
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        assert getattr(torch._dynamo.config, limit) > 2 * suite


def test_compiled_and_plain_adamw_are_the_same_step():
    # the written-out step, uncompiled
    for name in CASES["adamw"]:
        assert not wrong(torch_compile.FUNCTIONS["adamw"], "adamw", case_of("adamw", name), "fwd")


def test_ours_refuses_what_the_row_lacks():
    one = provider(OURS)
    op = CATALOG["attention"]
    assert one.cannot(op, case_of("attention", "causal"), "float32", "fwd") is None
    assert "impl" not in providers._declared(one.ops["attention"])
    # not by an undeclared option, and so by the row's expression
    lacking = replace(op, lacks="grouped")
    assert "grouped" in one.cannot(lacking, case_of("attention", "grouped_heads"), "float32", "fwd")
    for case in op.select("full", op.supported):
        assert one.cannot(op, case, "float32", "bwd") is None
        assert one.cannot(lacking, case, "float32", "bwd") is None or "grouped" in case.tags
    linear = CATALOG["linear"], case_of("linear", "odd")
    assert one.cannot(*linear, "float32", "fwd") == "has no linear"


def test_ours_has_the_ops_that_the_kernels_at_hand_have(monkeypatch):
    """The kernels may be those of an earlier commit."""
    monkeypatch.setattr(kernels, "__all__", [n for n in kernels.__all__ if n != "ffn"])
    (ours,), _ = load("cpu", [OURS])
    wide = CATALOG["ffn"].cases[0]
    assert ours.cannot(CATALOG["ffn"], wide, "float32", "fwd") == "has no ffn"
    assert "layer_norm" in ours.ops


def test_a_provider_says_what_it_does_not_take():
    one = Provider("one", "1", {"layer_norm": lambda x, w, b: x})
    op = CATALOG["layer_norm"]
    assert one.cannot(op, case_of("layer_norm", "odd_row"), "float32", "fwd") is None
    assert one.cannot(op, case_of("layer_norm", "eps"), "float32", "fwd") == "does not take eps"


@pytest.mark.parametrize(
    ("name", "op", "case", "dtype", "direction", "reason"),
    [
        ("torch_sdpa_math", "attention", "one_query", "float32", "fwd", "top-left"),
        ("torch_sdpa_math", "attention", "window", "float32", "fwd", "does not take window"),
        ("torch_eager", "attention", "unseeing_queries", "float32", "fwd", "sees no key"),
        ("jax", "attention", "one_query", "float32", "fwd", "top-left"),
        ("jax", "layer_norm", "odd_row", "float32", "bwd", "has no backward"),
        ("numpy_reference", "linear", "odd", "bfloat16", "fwd", "for float32"),
        ("numpy_reference", "linear", "odd", "float32", "bwd", "has no backward"),
        ("flex_attention", "attention", "causal", "float32", "bwd", "has no backward"),
        ("flex_attention", "attention", "lse", "float32", "fwd", "has no lse"),
    ],
)
def test_a_provider_says_why_it_cannot(name, op, case, dtype, direction, reason):
    got = provider(name).cannot(CATALOG[op], case_of(op, case), dtype, direction)
    assert reason in got
    assert "\n" not in got


def test_sdpa_is_pinned():
    q = torch.zeros(1, 1, 4, 8)
    (pinned,) = load("cpu", ["torch_sdpa_math"])[0]
    with torch.profiler.profile() as profile:
        pinned.ops["attention"](q, q, q)
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_attention_math" in names
    # a CPU has no cuDNN: pinned, it does not choose another
    cudnn = providers.torch_sdpa._provider("torch_sdpa_cudnn", "cuda")
    with pytest.raises(RuntimeError, match="backend"):
        cudnn.ops["attention"](q, q, q)
    case = case_of("attention", "causal")
    assert "16 bits" in cudnn.cannot(CATALOG["attention"], case, "float32", "fwd")
    assert cudnn.cannot(CATALOG["attention"], case, "bfloat16", "fwd") is None


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as plain torch, which has an lse on a CPU."""
    module = providers.flex_attention
    flex = sys.modules[module.flex_attention.__module__]
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "compiled", lambda fn: fn)
    return module.load("cpu")[0].ops["attention"]


@pytest.mark.parametrize("name", [*CASES["attention"], "documents_full", "unseeing_queries"])
def test_flex_masks_are_right(name, uncompiled):
    assert not wrong(uncompiled, "attention", case_of("attention", name), "fwd")


def test_flex_masks_follow_their_documents(uncompiled):
    """A mask is kept, and made anew where the documents' ends are written over."""
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    for middle in (3, 5, 4):
        ends[1] = middle
        got = uncompiled(q, k, v, cu_seqlens=ends)
        want = [
            torch.nn.functional.scaled_dot_product_attention(q[:, :, s], k[:, :, s], v[:, :, s])
            for s in (slice(0, middle), slice(middle, 8))
        ]
        torch.testing.assert_close(got, torch.cat(want, 2))
    before = providers.flex_attention._block_mask.cache_info()
    uncompiled(q, k, v, cu_seqlens=ends)
    after = providers.flex_attention._block_mask.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)


def test_flex_is_timed_forward_on_inputs_that_have_gradients(uncompiled):
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not uncompiled(q, q, q, causal=True).requires_grad


def test_sampling_keeps_the_most_probable_token():
    logits, u = torch.randn(50, 33), torch.rand(50)
    got = torch_eager.OPS["sample"](logits, u, top_p=1e-9)
    torch.testing.assert_close(got, logits.argmax(-1))


def flash_like(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """What flash-attn documents: (B, T, H, D), bottom-right, both ends of a window included."""
    left, right = window_size
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    Tq, Tk = q.shape[2], k.shape[2]
    away = torch.arange(Tk) - (torch.arange(Tq)[:, None] + Tk - Tq)
    hidden = away > 0 if causal else torch.zeros(Tq, Tk, dtype=torch.bool)
    hidden = hidden | ((left >= 0) & (away < -left)) | ((right >= 0) & (away > right))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    return (s.softmax(-1) @ v).transpose(1, 2)


class EngineLike:
    """What Transformer Engine documents of its attention."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, qkv_format,
        attn_mask_type, softmax_scale, window_size,
    ):  # fmt: skip
        assert (qkv_format, attention_dropout) == ("bshd", 0.0)
        assert attn_mask_type in ("causal_bottom_right", "no_mask")
        self.settings = dict(
            softmax_scale=softmax_scale, causal=attn_mask_type != "no_mask",
            window_size=window_size or (-1, -1),
        )  # fmt: skip

    def __call__(self, q, k, v):
        return flash_like(q, k, v, **self.settings).flatten(2)


class NormLike(torch.nn.Module):
    def __init__(self, width, eps, dtype):
        super().__init__()
        self.norm = dict(normalized_shape=(width,), eps=eps)
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(width, dtype=dtype))

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, weight=self.weight, bias=self.bias, **self.norm)


LIKE = {
    flash_attn: SimpleNamespace(flash_attn_func=flash_like),
    transformer_engine: SimpleNamespace(DotProductAttention=EngineLike, LayerNorm=NormLike),
}


@pytest.mark.parametrize("module", LIKE, ids=lambda module: module.NAMES[0])
def test_a_library_that_is_not_here_is_called_as_it_documents(module, monkeypatch, subtests):
    monkeypatch.setattr(module, "library", lambda *names: (LIKE[module], "1.0"))
    (one,) = module.load("cuda")
    assert "16 bits" in one.cannot(
        CATALOG["attention"], case_of("attention", "causal"), "float32", "fwd"
    )
    cases = CASES | {"attention": ("full", "causal", "one_query", "grouped_heads", "window",
                                   "window_both_sides", "scale_zero")}  # fmt: skip
    for op in one.ops:
        for name in cases[op]:
            case = case_of(op, name)
            # the stand-in computes in float32; the library would not
            if one.cannot(CATALOG[op], case, "bfloat16", "bwd"):
                continue
            with subtests.test(op=op, case=name):
                assert not wrong(one.ops[op], op, case, "bwd")


def test_cublaslt_computes_what_it_says(subtests):
    assert not wrong(cublaslt.linear, "linear", case_of("linear", "odd"), "bwd")
    for name in ("relu", "rank_three"):
        # torch's CPU form of the fused product has the erf GELU, so only ReLU is alike
        case = case_of("ffn", name)
        relu = Case(name, shapes=case.shapes, **{**case.settings, "activation": "relu"})
        assert not wrong(cublaslt.ffn, "ffn", relu, "fwd")
    assert cublaslt._limits(CATALOG["ffn"], case_of("ffn", "erf"), "bfloat16", "fwd")
    assert cublaslt._limits(CATALOG["ffn"], case_of("ffn", "odd"), "bfloat16", "bwd")
    assert cublaslt._limits(CATALOG["ffn"], case_of("ffn", "odd"), "bfloat16", "fwd") is None


def test_liger_is_called_as_it_wants():
    """In Triton's interpreter, in a process of its own: its kernels have to change it."""
    pytest.importorskip("liger_kernel")
    ran = python("-c", LIGER)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert set(found) == {"layer_norm", "cross_entropy", "linear_cross_entropy"}
    for op, (forward, backward) in found.items():
        assert forward == [], op
        assert backward == [], op


LIGER = """
import json
import examples.interpreted
from gaugeblock.benchmarks.providers import liger
from gaugeblock.reference.oracle import check

(one,) = liger.load("cuda")
expression = {"layer_norm": "odd_row or eps"}
found = {}
for op, fn in one.ops.items():
    words = expression.get(op, "odd or smoothed and not ignored")
    reports = [
        check(op, fn, backward=backward, expression=words, layouts=("contiguous",))
        for backward in (False, True)
    ]
    assert all(report.results for report in reports)
    found[op] = [[str(r) for r in report.failures] for report in reports]
print(json.dumps(found))
"""


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    found, missing = load("cpu", ["jax", OURS])
    assert [p.name for p in found] == [OURS]
    assert missing == {"jax": "needs jax, which is not installed"}


def test_a_broken_library_is_a_reason(monkeypatch):
    def broken(name):
        raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(providers, "import_module", broken)
    with pytest.raises(Unavailable) as caught:
        library("flash_attn", "flash-attn")
    assert str(caught.value) == (
        "needs flash-attn, which cannot be imported: libcuda.so.1: cannot open"
    )


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found, missing = load("cpu", ["flex_attention", "torch_compile"])
    assert found == []
    for reason in missing.values():
        assert reason == "needs a C++ compiler, and there is no no-such-compiler"


@pytest.mark.parametrize("names", [None, ["torch_eager", "liger_kernel"]])
def test_without_a_gpu_cuda_gives_reasons(names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, missing = load("cuda", names)
    assert found == []
    assert set(missing) == set(names or NAMES)
    assert set(missing.values()) == {"needs a CUDA device, and there is none"}


def test_everybody_is_found_or_missing():
    found, missing = load("cpu")
    assert found[0].name == OURS
    assert sorted([*(p.name for p in found), *missing]) == sorted(NAMES)
    for reason in missing.values():
        assert reason
        assert "\n" not in reason


@pytest.mark.parametrize(("device", "names"), [("cpu", ["torch_eagre"]), ("tpu", None)])
def test_an_unknown_name_is_refused(device, names):
    with pytest.raises(ValueError, match="must be") as caught:
        load(device, names)
    assert (names or [device])[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_provider_may_come_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(
        "from gaugeblock.benchmarks.providers import Provider\n"
        "mine = Provider('mine', '0.3', {'layer_norm': lambda x, w, b: x})\n"
        "theirs = Provider('torch_eager', '1', {})\n"
        "ours = Provider('gaugeblock_fast', '1', {})\n"
        "no_provider = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found, missing = load("cpu", ["mine_of_a_test:mine"])
    assert ([p.name for p in found], missing) == (["mine"], {})
    found, _ = load("cpu", ["mine_of_a_test:mine", OURS, "torch_eager"])
    assert [p.name for p in found] == [OURS, "mine", "torch_eager"]
    files = [p.file for p in found]
    assert files == [None, str(tmp_path / "mine_of_a_test.py"), None]
    for name, rule in (
        ("theirs", "a name of its own, got 'torch_eager'"),
        ("ours", "a name of its own, got 'gaugeblock_fast'"),
        ("no_provider", "must be a Provider, got int"),
        ("nothing", "must define nothing"),
    ):
        with pytest.raises(ValueError, match=rule) as caught:
            load("cpu", [f"mine_of_a_test:{name}"])
        assert "\n" not in str(caught.value)
