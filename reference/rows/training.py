"""Rows of `dropout`, `adamw` and `adam`."""

from ..oracle.op import Case, Input, Wrong
from .parts import adam_parts, adamw_parts, dropout_parts
from .row import CPU, FAMILY, SWEEP, row
from .values import all_negative, offset_64, outlier_row, tiny, zeros

DROPOUT = row(
    "dropout",
    {"x": "M N"},
    [
        Case("odd", M=5, N=77, p=0.1, seed=7),
        Case("one_element", M=1, N=1, p=0.5, seed=1, tags=("degenerate",)),
        Case("one_row", M=1, N=100, p=0.5, seed=0),
        Case("one_column", M=67, N=1, p=0.5, seed=3),
        Case("one_below_a_tile", M=1, N=1023, p=0.3, seed=11),
        Case("one_over_a_tile", M=1, N=1025, p=0.3, seed=11),
        Case("several_tiles", M=41, N=103, p=0.2, seed=5),
        Case("mostly_dropped", M=9, N=120, p=0.9, seed=2),
        Case("mostly_kept", M=31, N=130, p=0.01, seed=2),
        # the high half of the key, two's complement, and both ends of 64 bits
        Case("seed_past_32_bits", M=6, N=50, p=0.5, seed=2**32),
        Case("seed_negative", M=6, N=50, p=0.5, seed=-5),
        Case("seed_smallest", M=6, N=50, p=0.5, seed=-(2**63)),
        Case("seed_largest", M=6, N=50, p=0.5, seed=2**63 - 1),
        Case("offset_64", M=6, N=45, p=0.4, seed=9, values={"x": offset_64}),
        Case("outlier_row", M=6, N=45, p=0.4, seed=9, values={"x": outlier_row}),
        Case("tiny", M=6, N=45, p=0.4, seed=9, values={"x": tiny}),
        Case("negative", M=6, N=45, p=0.4, seed=9, values={"x": all_negative}),
        Case("nothing_dropped", M=5, N=77, p=0.0, seed=7, tags=("degenerate",)),
        Case("all_dropped", M=5, N=77, p=1.0, seed=7, tags=("degenerate",)),
        Case("no_rows", M=0, N=16, p=0.5, seed=1, tags=("degenerate", "full")),
        Case("gpt2_width", M=32768, N=768, p=0.1, seed=1, tags=("aot", *FAMILY)),
        Case("cpu_bench", M=1024, N=768, p=0.1, seed=1, tags=CPU),
    ],
    outputs={"y": "M N"},
    flops=lambda c, direction: c.M * c.N,
    # the mask costs no memory: each direction reads a tensor and writes one
    moves=lambda c, itemsize, direction: (itemsize * c.M * c.N,) * 2,
    errors=(
        Wrong("p_negative", "p must lie in", options={"p": -0.1}),
        Wrong("p_over_1", "p must lie in", options={"p": 1.1}),
        Wrong("p_text", "p must be a number", options={"p": "0.1"}, raises=TypeError),
        Wrong("p_nan", "p must lie in", options={"p": float("nan")}),
        Wrong("seed_float", "seed must be an integer", options={"seed": 1.5}, raises=TypeError),
        Wrong("seed_over_64_bits", "seed must lie in", options={"seed": 2**64}),
    ),
    sampled=dropout_parts,
)


def _squared(v, dims, rng):
    """A second moment is never negative."""
    return v * v


def _tiny_squared(v, dims, rng):
    return (v * 1e-6) ** 2


def _outlier_row_100(x, dims, rng):
    """One row a hundred times the others; its squares stay in float16's range."""
    x[-1] *= 100
    return x


def _outlier_row_squared(v, dims, rng):
    return _outlier_row_100(v, dims, rng) ** 2 / 4


def _adamw_case(name, M, N, *, values=None, tags=(), **options):
    """A step that moves p by a tenth, so that every term shows in 16 bits."""
    usual = dict(step=10, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    return Case(name, M=M, N=N, values={"v": _squared} | (values or {}), tags=tags,
                **usual | options)  # fmt: skip


_TRAINED = dict(step=1000, lr=6e-4)
_STATE = {name: Input("M N", grad=False) for name in ("p", "g", "m", "v")}

_ERRORS = (
    Wrong("g_shape", "g must have shape", shapes={"g": (5, 76)}),
    Wrong("m_shape", "m must have shape", shapes={"m": (77, 5)}),
    Wrong("v_shape", "v must have shape", shapes={"v": (5,)}),
    Wrong("step_zero", "step must be at least 1", options={"step": 0}),
    Wrong("step_float", "step must be an integer", options={"step": 1.5}, raises=TypeError),
    Wrong("step_over_63_bits", "step must be below", options={"step": 2**63}),
    Wrong("lr_none", "lr must be a number", options={"lr": None}, raises=TypeError),
    Wrong("lr_negative", "lr must be finite", options={"lr": -1e-3}),
    Wrong("lr_nan", "lr must be finite", options={"lr": float("nan")}),
    Wrong("beta1_one", "beta1 must lie in", options={"beta1": 1.0}),
    Wrong("beta2_negative", "beta2 must lie in", options={"beta2": -0.1}),
    Wrong("eps_negative", "eps must be finite", options={"eps": -1e-8}),
    Wrong("decay_negative", "weight_decay must be finite", options={"weight_decay": -0.1}),
)

ADAMW = row(
    "adamw",
    _STATE,
    [
        _adamw_case("odd", 5, 77),
        _adamw_case("one_element", 1, 1),
        _adamw_case("one_row", 1, 100),
        _adamw_case("one_below_a_tile", 1, 1023),
        _adamw_case("one_over_a_tile", 1, 1025),
        _adamw_case("several_tiles", 41, 103),
        # without bias correction the first step is far too long
        _adamw_case("first_step", 5, 40, step=1, values={"m": zeros, "v": zeros}),
        _adamw_case("late_step", 5, 40, step=100_000),
        _adamw_case("step_past_32_bits", 5, 40, step=2**32 + 1),
        _adamw_case("slow_moments", 5, 40, step=3, beta1=0.99, beta2=0.999),
        _adamw_case("beta1_zero", 5, 40, beta1=0.0),
        _adamw_case("beta2_zero", 5, 40, beta2=0.0),
        _adamw_case("no_decay", 5, 40, weight_decay=0.0),
        # decay that passed through the moments would be divided by their root
        _adamw_case("large_decay", 5, 40, weight_decay=2.0),
        _adamw_case("eps", 5, 40, eps=0.5),
        _adamw_case("learning_rate_zero", 5, 40, lr=0.0),
        _adamw_case("no_gradient", 5, 40, values={"g": zeros}),
        _adamw_case("no_gradient_yet", 5, 40, values={"g": zeros, "m": zeros, "v": zeros}),
        _adamw_case("outlier_row", 5, 40, values={"g": _outlier_row_100,
                                                  "v": _outlier_row_squared}),
        _adamw_case("tiny", 5, 40, values={"g": tiny, "m": tiny, "v": _tiny_squared}),
        _adamw_case("negative", 5, 40, values=dict.fromkeys("pgm", all_negative)),
        _adamw_case("offset_64", 5, 40, values={"p": offset_64}),
        _adamw_case("no_rows", 0, 16, tags=("degenerate", "full")),
        _adamw_case("gpt2_mlp", 768, 3072, **_TRAINED, tags=("aot", *SWEEP)),
        # 124,439,808 parameters, as rows of the model's width
        _adamw_case("gpt2_parameters", 162_031, 768, **_TRAINED, tags=FAMILY),
        _adamw_case("cpu_bench", 768, 768, **_TRAINED, tags=CPU),
    ],
    outputs={"p": "M N", "m": "M N", "v": "M N"},
    updates={"p": "p", "m": "m", "v": "v"},
    batch="M",
    flops=lambda c, direction: c.M * c.N * (14 if direction == "fwd" else 0),
    errors=_ERRORS,
    sampled=adamw_parts,
)  # fmt: skip


# by default of OpenAI's code; the rate is folded, so that early steps are short ones
_GPT1 = dict(beta2=0.999, weight_decay=0.01)
_GPT1_TRAINED = dict(step=1000, lr=2.5e-4) | _GPT1

ADAM = row(
    "adam",
    _STATE,
    [
        _adamw_case("odd", 5, 77),
        _adamw_case("one_element", 1, 1),
        _adamw_case("one_over_a_tile", 1, 1025),
        _adamw_case("several_tiles", 41, 103),
        # a step that is corrected after its root, or not at all, is another
        _adamw_case("first_step", 5, 40, step=1, values={"m": zeros, "v": zeros}),
        _adamw_case("second_step", 5, 40, step=2, **_GPT1),
        _adamw_case("late_step", 5, 40, step=100_000, **_GPT1),
        _adamw_case("beta1_zero", 5, 40, beta1=0.0),
        _adamw_case("beta2_zero", 5, 40, beta2=0.0),
        _adamw_case("no_decay", 5, 40, weight_decay=0.0),
        _adamw_case("large_decay", 5, 40, weight_decay=2.0),
        # beside the root of the uncorrected moment
        _adamw_case("eps", 5, 40, step=3, eps=0.5),
        _adamw_case("learning_rate_zero", 5, 40, lr=0.0),
        _adamw_case("no_gradient_yet", 5, 40, values={"g": zeros, "m": zeros, "v": zeros}),
        _adamw_case("outlier_row", 5, 40, values={"g": _outlier_row_100,
                                                  "v": _outlier_row_squared}),
        _adamw_case("negative", 5, 40, values=dict.fromkeys("pgm", all_negative)),
        _adamw_case("no_rows", 0, 16, tags=("degenerate", "full")),
        _adamw_case("cpu_bench", 768, 768, **_GPT1_TRAINED, tags=CPU),
    ],
    outputs={"p": "M N", "m": "M N", "v": "M N"},
    updates={"p": "p", "m": "m", "v": "v"},
    batch="M",
    flops=lambda c, direction: c.M * c.N * (14 if direction == "fwd" else 0),
    errors=_ERRORS,
    kernel="GPT-1's optimiser, for its checkpoints; what is trained here is trained with adamw",
    sampled=adam_parts,
)  # fmt: skip
