"""What a training step of a GPT should take on an H200, kernel by kernel: none of it is measured.

    time of a call = max(flops / (0.92·matrix rate), bytes / (0.85·copy rate))

flops and bytes are the catalog's own: backward products twice the forward's, and three times in
linear_cross_entropy, which computes the logits again. Attention takes what `estimates` says, whose
two ends are all overlapped and one after the other. What the model does between the ops (rearrange
heads, cast weights, add up gradients) is counted in bytes. Ceilings are those of `estimates`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gaugeblock.gpt.config import GPTConfig
from gaugeblock.kernels.ceilings import copy_gb_s
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case

from .estimates import PASSES, _range, _table, estimate, h200_ceilings, row_of
from .record import RESULTS
from .words import NOTHING, figure

# what training must reach on an H200: 600k tokens a second
TARGET_TOKENS_S = 600_000
# shares of the ceilings that the kernels must reach: of cuBLASLt's products, of a copy
PRODUCTS, COPY = 0.92, 0.85
# of a micro-batch, and what the optimiser's step follows on
ROWS, STEP_TOKENS = 32, 1 << 19
# bytes of an element of activations and of the weights they meet; of masters, moments and sums
_ITEM, _MASTER = 2, 4
GPT2 = GPTConfig()


@dataclass(frozen=True)
class Line:
    """A kernel of the step; flops, bytes and seconds are of one call."""

    name: str
    direction: str
    calls: int
    tokens: int  # that all the calls are for
    flops: float
    moved_bytes: float
    seconds: tuple  # least and most
    limit: str

    @property
    def us_a_token(self):
        return tuple(1e6 * self.calls * s / self.tokens for s in self.seconds)


def budget(ceilings, config=GPT2, rows=ROWS):
    """The Lines of a step, forward, then backward, then the optimiser."""
    return [
        line
        for direction in ("fwd", "bwd")
        for line in (
            *_ops(ceilings, config, rows, direction),
            *_between(ceilings, config, rows, direction),
        )
    ] + list(_optimiser(ceilings, config))


def total_us(lines):
    """(least, most) µs a token."""
    return tuple(map(sum, zip(*(line.us_a_token for line in lines))))


def parameters(config=GPT2):
    C, F = config.n_embd, config.n_inner or 4 * config.n_embd
    layer = 4 * C * C + 2 * C * F + 9 * C + F
    return (config.vocab_size + config.block_size + 2) * C + config.n_layer * layer


def _ops(ceilings, config, rows, direction):
    L, H, T, C = config.n_layer, config.n_head, config.block_size, config.n_embd
    M, V, F = rows * T, config.vocab_size, config.n_inner or 4 * config.n_embd
    heads = Case("attention", B=rows, H=H, Tq=T, Tk=T, D=C // H, causal=True)
    parts = (
        ("embedding", "embedding", 1, Case("tokens", B=rows, T=T, V=V, P=T, C=C)),
        ("layer_norm, the first", "layer_norm", 1, Case("first", M=M, N=C)),
        ("linear, q k v", "linear", L, Case("qkv", M=M, K=C, N=3 * C)),
        ("attention", "attention", L, heads),
        ("linear, out", "linear", L, Case("out", M=M, K=C, N=C)),
        ("ffn", "ffn", L, Case("ffn", M=M, C=C, F=F)),
        ("residual_layer_norm", "residual_layer_norm", 2 * L, Case("norm", M=M, N=C)),
        ("linear_cross_entropy", "linear_cross_entropy", 1, Case("head", M=M, C=C, V=V)),
    )
    for name, op, calls, case in parts:
        flops = CATALOG[op].flop_count(case, direction)
        moved = CATALOG[op].byte_count(case, _ITEM, direction)
        if op == "attention":
            yield _attention(ceilings, case, direction, calls, M, flops, moved)
        else:
            yield _line(ceilings, name, direction, calls, M, flops, moved)


def _between(ceilings, config, rows, direction):
    """What the model does in torch: one pass over heads, weights or gradients each."""
    tokens = rows * config.block_size
    hidden, weights = _ITEM * tokens * config.n_embd, parameters(config)
    if direction == "fwd":
        # o becomes rows of all heads; weights are rounded
        heads, name, each = 2 * hidden, "weights to bfloat16", _MASTER + _ITEM
    else:
        # dq, dk and dv become one gradient; gradients are widened, and added to a sum
        heads, name, each = 6 * hidden, "gradients to float32, added", _ITEM + 4 * _MASTER
    yield _line(ceilings, "heads to rows", direction, config.n_layer, tokens, 0, heads)
    yield _line(ceilings, name, direction, 1, tokens, 0, each * weights)
    if direction == "bwd":
        # the tied table has a gradient as the embedding and one as the head
        both = 3 * _MASTER * config.vocab_size * config.n_embd
        yield _line(ceilings, "gradients of wte, added", direction, 1, tokens, 0, both)


def _optimiser(ceilings, config):
    weights, op = parameters(config), CATALOG["adamw"]
    case = Case("step", M=1, N=weights)
    flops, moved = op.flop_count(case), op.byte_count(case, _MASTER)
    yield _line(ceilings, "norm of the gradients", "step", 1, STEP_TOKENS, 0, _MASTER * weights)
    yield _line(ceilings, "adamw", "step", 1, STEP_TOKENS, flops, moved)


def _line(ceilings, name, direction, calls, tokens, flops, moved):
    times = {
        "matrix": flops / (PRODUCTS * 1e12 * ceilings["matrix_tflop_s"]["bfloat16"]),
        "copy": moved / (COPY * 1e9 * copy_gb_s(ceilings, moved)),
    }
    limit = max(times, key=times.get)
    return Line(name, direction, calls, tokens, flops, moved, (times[limit],) * 2, limit)


def _attention(ceilings, case, direction, calls, tokens, flops, moved):
    found = [estimate(k, case, row_of(k, case), ceilings) for k in PASSES[direction]]
    seconds = sum(e.overlapped_s for e in found), sum(e.serial_s for e in found)
    limit = max(found, key=lambda e: e.overlapped_s).limit
    return Line("attention", direction, calls, tokens, flops, moved, seconds, limit)


def needed_tflop_s(lines):
    """The rate of the products outside of attention at which the target is met."""
    products = _products(lines)
    rest = total_us(lines)[1] - total_us(products)[1]
    flops = sum(line.calls * line.flops / line.tokens for line in products)
    return flops / (1e6 / TARGET_TOKENS_S - rest) / 1e6


def _products(lines):
    return [line for line in lines if line.limit == "matrix" and line.name != "attention"]


def parts(results=RESULTS):
    """{name: Markdown} of the generated parts of docs/step.md."""
    ceilings, name = h200_ceilings(results)
    lines = budget(ceilings)
    return {
        "assumptions": _assumptions(ceilings, name),
        "budget": _budget(lines),
        "doubts": _doubts(lines, ceilings),
    }


def _assumptions(ceilings, name):
    c = GPT2
    rows = [
        ("model", f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, vocabulary "
                  f"{c.vocab_size:,}, {parameters():,} parameters"),
        ("micro-batch", f"{ROWS} × {c.block_size:,} = {ROWS * c.block_size:,} tokens"),
        ("step", f"{STEP_TOKENS:,} tokens, {STEP_TOKENS // ROWS // c.block_size} micro-batches"),
        ("products", f"{PRODUCTS} of {ceilings['matrix_tflop_s']['bfloat16']:.4g} TFLOP/s"),
        ("memory", f"{COPY} of {copy_gb_s(ceilings, 1 << 30) / 1e3:.3g} TB/s"),
        ("ceilings", f"record `{name}`" if name else "measured before there was a record"),
    ]  # fmt: skip
    return _table(["", ""], rows)


def _budget(lines):
    least, most = total_us(lines)
    rows = [
        [line.name, line.direction, line.calls,
         figure(line.flops / 1e9) if line.limit == "matrix" else NOTHING,
         figure(line.moved_bytes / 1e6), line.limit, _range([1e6 * s for s in line.seconds]),
         _range(line.us_a_token), f"{100 * line.us_a_token[1] / most:.1f}%"]
        for line in lines
    ]  # fmt: skip
    rows.append(["**together**", *[""] * 6, f"**{_range((least, most))}**", "100.0%"])
    head = ["kernel", "", "calls", "GFLOP", "MB", "limit", "µs a call", "µs a token", "share"]
    target = 1e6 / TARGET_TOKENS_S
    verdict = "under" if most < target else "not under"
    return _table(head, rows) + (
        f"\n{_range((least, most))} µs a token, {verdict} the {target:.3g} µs of "
        f"{TARGET_TOKENS_S // 1000}k tokens a second: "
        f"{_range([1e3 / most, 1e3 / least])} thousand tokens a second.\n"
    )


def _doubts(lines, ceilings):
    """What the sum becomes where one assumption is wrong."""
    M = ROWS * GPT2.block_size
    ends = total_us(lines)
    copies = total_us([line for line in lines if line.limit == "copy"])[1]
    products = total_us(_products(lines))[1]
    # a chunk's gradient of the logits is written once and read by two products
    dlogits_s = 3 * _ITEM * M * GPT2.vocab_size / (COPY * 1e9 * copy_gb_s(ceilings, 1 << 30))
    more = {
        "as above": 0,
        "products a tenth slower": products / 9,
        "memory-bound kernels a third slower": copies / 2,
        "gradients of the logits pass through memory, nothing overlapped": 1e6 * dlogits_s / M,
    }
    more["all three"] = sum(more.values())
    rows = [
        [name, _range([x + us for x in ends]), _range([1e3 / (x + us) for x in ends[::-1]])]
        for name, us in more.items()
    ]
    needed = needed_tflop_s(lines)
    return _table(["", "µs a token", "thousand tokens a second"], rows) + (
        f"\nWith attention at its slower end, products outside of it have to reach "
        f"{needed:.0f} TFLOP/s for the {1e6 / TARGET_TOKENS_S:.3g} µs: "
        f"{100 * needed / ceilings['matrix_tflop_s']['bfloat16']:.0f}% of the ceiling.\n"
    )
