"""Rows of `cross_entropy` and `linear_cross_entropy`."""

import numpy as np

from ..oracle.op import Case, Index, Input, Wrong
from .parts import cross_entropy_parts, linear_cross_entropy_parts
from .row import CPU, FAMILY, LARGE, SWEEP, row
from .values import (
    all_ignored,
    all_negative,
    all_positive,
    offset_64,
    outlier_row,
    some_ignored,
    spread_by_100,
    tiny,
)


def _absent(b, dims, rng):
    """The optional input is not given."""
    return None


def _padded_vocabulary(b, dims, rng):
    """The last three columns exist in memory only."""
    b[-3:] = -np.inf
    return b


def _first_140_masked(b, dims, rng):
    """More than a whole tile of −∞ before the first finite logit."""
    b[:140] = -np.inf
    return b


def _before_the_padding(targets, dims, rng):
    return targets % (dims["V"] - 3)


def _past_140(targets, dims, rng):
    return 140 + targets % (dims["V"] - 140)


def _some_3(targets, dims, rng):
    """Targets that another ignore_index leaves out."""
    targets[::3] = 3
    return targets


def _minus_200(logits, dims, rng):
    """A maximum that starts from 0 makes every exponential 0."""
    return logits - 200


def _last_3_masked(logits, dims, rng):
    logits[..., -3:] = -np.inf
    return logits


def _first_140_masked_logits(logits, dims, rng):
    logits[..., :140] = -np.inf
    return logits


CROSS_ENTROPY = row(
    "cross_entropy",
    {"logits": "M V", "targets": Index("M", below="V")},
    [
        Case("odd", M=7, V=101),
        Case("none", M=9, V=33, reduction="none"),
        Case("sum", M=9, V=33, reduction="sum"),
        Case("ignored", M=10, V=29, values={"targets": some_ignored}),
        Case("ignored_none", M=10, V=29, reduction="none", values={"targets": some_ignored}),
        Case(
            "all_ignored_sum",
            M=4,
            V=29,
            reduction="sum",
            values={"targets": all_ignored},
            tags=("degenerate",),
        ),
        Case("all_ignored_mean", M=4, V=29, values={"targets": all_ignored}, tags=("degenerate",)),
        Case("smoothed", M=6, V=50, label_smoothing=0.1),
        Case("smoothed_ignored", M=6, V=50, label_smoothing=0.3, values={"targets": some_ignored}),
        Case("logits_spread_by_100", M=6, V=40, values={"logits": spread_by_100}),
        Case("several_tiles", M=3, V=4099),
        Case("one_row_of_several_tiles", M=1, V=9001, reduction="none"),
        Case(
            "rank_three",
            B=3,
            T=5,
            V=29,
            shapes={"logits": "B T V", "targets": "B T"},
        ),
        Case("one_token", M=4, V=1, tags=("degenerate",)),
        Case("negative", M=6, V=40, values={"logits": all_negative}),
        Case("tiny", M=6, V=40, values={"logits": tiny}),
        Case("ignore_index", M=10, V=29, ignore_index=3, values={"targets": _some_3}),
        Case("all_far_below_zero", M=6, V=40, values={"logits": _minus_200}),
        Case(
            "padded_vocabulary",
            M=6,
            V=67,
            values={"logits": _last_3_masked, "targets": _before_the_padding},
        ),
        Case(
            "first_tile_masked",
            M=6,
            V=300,
            values={"logits": _first_140_masked_logits, "targets": _past_140},
        ),
        Case("no_rows", M=0, V=12, reduction="sum", tags=("degenerate", "full")),
        Case("gpt2_vocabulary", M=8192, V=50257, tags=("aot", *FAMILY)),
        Case("gpt2_padded_vocabulary", M=8192, V=50304, tags=FAMILY),
        Case(
            "smoothed_vocabulary",
            M=128,
            V=50304,
            label_smoothing=0.1,
            tags=("aot", "configuration"),
        ),
        Case("gpt2_many_tokens", M=32768, V=50257, tags=SWEEP),
        Case("cpu_bench", M=64, V=50257, tags=CPU),
    ],
    outputs={"loss": ""},
    flops=lambda c, direction: c.M * c.V * 4,
    errors=(
        Wrong("target_too_large", "targets must lie in", values={"targets": lambda t: t + 101}),
        Wrong("target_count", "targets must have shape", shapes={"targets": (6,)}),
        Wrong("unknown_reduction", "reduction must be one of", options={"reduction": "max"}),
        Wrong("smoothing_over_1", "label_smoothing must lie in", options={"label_smoothing": 1.5}),
    ),
    sampled=cross_entropy_parts,
)


_NO_B = {"b": _absent}

LINEAR_CROSS_ENTROPY = row(
    "linear_cross_entropy",
    {"x": "M C", "w": Input("V C", fan_in="C"), "targets": Index("M", below="V"), "b": "V"},
    [
        Case("odd", M=7, C=33, V=101),
        Case("no_bias", M=7, C=33, V=101, values=_NO_B),
        Case("one_row", M=1, C=16, V=40, values=_NO_B),
        Case("one_token", M=4, C=9, V=1, tags=("degenerate",)),
        Case("one_below_a_tile", M=63, C=31, V=127, values=_NO_B),
        Case("one_over_a_tile", M=65, C=65, V=129, values=_NO_B),
        Case("several_tiles", M=5, C=40, V=1031),
        Case("none", M=9, C=20, V=33, reduction="none", values=_NO_B),
        Case("sum", M=9, C=20, V=33, reduction="sum", values=_NO_B),
        Case("ignored", M=10, C=24, V=29, values={"targets": some_ignored} | _NO_B),
        Case(
            "ignored_none",
            M=10,
            C=24,
            V=29,
            reduction="none",
            values={"targets": some_ignored},
        ),
        Case(
            "all_ignored_sum",
            M=4,
            C=12,
            V=29,
            reduction="sum",
            values={"targets": all_ignored},
            tags=("degenerate",),
        ),
        Case(
            "all_ignored_mean",
            M=4,
            C=12,
            V=29,
            values={"targets": all_ignored},
            tags=("degenerate",),
        ),
        Case("ignore_index", M=10, C=24, V=29, ignore_index=3, values={"targets": _some_3}),
        Case("many_rows", M=300, C=12, V=20, values=_NO_B),
        Case("smoothed", M=6, C=20, V=50, label_smoothing=0.1, values=_NO_B),
        Case(
            "smoothed_ignored",
            M=6,
            C=20,
            V=50,
            label_smoothing=0.3,
            values={"targets": some_ignored},
        ),
        Case("logits_spread_by_100", M=6, C=20, V=40, values={"x": spread_by_100}),
        Case("offset_64", M=6, C=20, V=40, values={"x": offset_64} | _NO_B),
        Case("outlier_row", M=6, C=20, V=40, values={"x": outlier_row}),
        Case("tiny", M=6, C=20, V=40, values={"x": tiny} | _NO_B),
        Case(
            "negative_logits",
            M=6,
            C=20,
            V=40,
            values={"x": all_positive, "w": all_negative} | _NO_B,
        ),
        Case(
            "padded_vocabulary",
            M=6,
            C=20,
            V=67,
            values={"b": _padded_vocabulary, "targets": _before_the_padding},
        ),
        Case(
            "first_tile_masked",
            M=6,
            C=20,
            V=300,
            values={"b": _first_140_masked, "targets": _past_140},
        ),
        Case("no_rows", M=0, C=8, V=12, reduction="sum", tags=("degenerate", "full")),
        Case("gpt2_head", M=8192, C=768, V=50257, values=_NO_B, tags=("aot", *FAMILY)),
        Case(
            "smoothed_head",
            M=4096,
            C=1600,
            V=50304,
            label_smoothing=0.1,
            tags=("aot", "configuration"),
        ),
        Case("gpt2_xl_head", M=8192, C=1600, V=50257, values=_NO_B, tags=LARGE),
        Case("cpu_bench", M=64, C=256, V=8191, values=_NO_B, tags=CPU),
    ],
    outputs={"loss": ""},
    # backward the logits again, dx and dw
    flops=lambda c, direction: 2 * c.M * c.C * c.V * (1 if direction == "fwd" else 3),
    errors=(
        Wrong("w_width", "w must have shape", shapes={"w": (101, 32)}),
        Wrong("b_length", "b must have shape", shapes={"b": (100,)}),
        Wrong("target_too_large", "targets must lie in", values={"targets": lambda t: t + 101}),
        Wrong("target_count", "targets must have shape", shapes={"targets": (6,)}),
        Wrong("unknown_reduction", "reduction must be one of", options={"reduction": "max"}),
        Wrong("smoothing_over_1", "label_smoothing must lie in", options={"label_smoothing": 1.5}),
    ),
    sampled=linear_cross_entropy_parts,
)
