"""What the attention kernels should take, reckoned from their work: none of it is measured.

    matrix = 2·products·scores·D' / rate      products: forward 2, dq 3, dkdv 4
    exp    = exponentials / their rate        one a score; forward, also one a row of a tile
    copy   = bytes of every input and output, each once / copy rate

    overlapped = max(matrix, exp, copy),   one after the other = max(matrix + exp, copy)

scores are those of the tiles that a kernel visits, with what the mask hides in them; D' is the head
dimension padded to a power of two. The catalog's flops count visible scores and D alone, and its
backward has five products where the kernels have seven: a share of the roof is of those flops.
Ceilings are those of the newest record of an H200, or figures measured before there was one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from gaugeblock.kernels import _configurations, artefacts
from gaugeblock.kernels._attention.configuration import FEW_QUERIES, HEAD_DIMS, head_options
from gaugeblock.kernels.ceilings import copy_gb_s, nominal
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case

from .record import RESULTS, load_record
from .words import NOTHING, figure, shape_words

# Measured on an H200, see docs/attention.md; float32 is nine tenths of the datasheet's 67 TFLOP/s.
H200 = {
    "copy_gb_s": {str(1 << 30): 4300.0},
    "matrix_tflop_s": {"bfloat16": 785.0, "float32": 60.0},
    "exp_t_s": 3.9,
}
# by its datasheet
A100 = nominal("sm_80")
CHIPS = {"sm_90": "H200", "sm_80": "A100"}
# the shapes that the kernels are built for, by their names in the catalog
CASES = (
    "gpt2_causal_512", "gpt2_causal_1k", "gpt2_causal_2k",
    "causal_2k_d128", "causal_4k_d128", "causal_8k_d128", "causal_16k_d128", "full_4k_d128",
    "banded_256_4k", "banded_1024_4k", "grouped_4k_d128",
)  # fmt: skip
DECODING = ("gpt2_decode", "long_decode")
PASSES = {"fwd": ("forward",), "bwd": ("delta", "dq", "dkdv")}
_PRODUCTS = {"forward": 2, "delta": 0, "dq": 3, "dkdv": 4}
# what a kernel reads and writes: tensors as large as q, as large as k, and of a float32 a query
_TRAFFIC = {"forward": (2, 2, 1), "delta": (2, 0, 1), "dq": (3, 2, 2), "dkdv": (2, 4, 2)}
_COUNTED = {"causal", "window"}
_MASKS = {*_COUNTED, "align", "global_tokens", "lengths", "cu_seqlens"}
# the shape at which a row of the configuration table is estimated, and its shorter one
_PAIRS, _LENGTH = (8, 16), 4096
_DTYPES = {16: "bfloat16", 32: "float32"}
_KERNELS = {"forward": "_attention_fwd_kernel", "dkdv": "_attention_bwd_dkdv_kernel",
            "dq": "_attention_bwd_dq_kernel"}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """The times of one kernel in seconds, each as if there were nothing else."""

    kernel: str
    tile: str
    scores: int  # visited, in all heads
    walked_bytes: int  # of all tiles that programs load one after the other
    matrix_s: float
    exp_s: float
    copy_s: float

    @property
    def overlapped_s(self):
        return max(self.matrix_s, self.exp_s, self.copy_s)

    @property
    def serial_s(self):
        return max(self.matrix_s + self.exp_s, self.copy_s)

    @property
    def limit(self):
        """What the kernel waits for when all overlaps: "matrix", "exp" or "copy"."""
        times = {"matrix": self.matrix_s, "exp": self.exp_s, "copy": self.copy_s}
        return max(times, key=times.get)


def spans(Tq, Tk, causal=False, window=None):
    """The first and the last key that each query sees, bottom-right: last < first where none."""
    own = np.arange(Tq) + Tk - Tq
    first, last = np.zeros(Tq, int), np.full(Tq, Tk - 1)
    if window is not None:
        first = np.maximum(own - window + 1, 0)
        last = np.minimum(own + window - 1, last)
    return first, np.minimum(own, last) if causal else last


def visited_tiles(Tq, Tk, BLOCK_M, BLOCK_N, causal=False, window=None):
    """How many tiles of a head show a score: those that each of the kernels visits."""
    first, last = spans(Tq, Tk, causal, window)
    sees, starts = first <= last, np.arange(0, Tq, BLOCK_M)
    # neighbours see neighbouring keys, so that what a tile of queries sees has no gaps
    low = np.minimum.reduceat(np.where(sees, first, Tk), starts)
    high = np.maximum.reduceat(np.where(sees, last, -1), starts)
    return int(np.maximum(high // BLOCK_N - low // BLOCK_N + 1, 0).sum())


def estimate(kernel, case, row, ceilings, dtype="bfloat16"):
    """The Estimate of "forward", "delta", "dq" or "dkdv" launched as a row of the table says.

    Raises ValueError for a case with a mask that is not counted.
    """
    c = _shape(case)
    M, N = row["BLOCK_M"], row["BLOCK_N"]
    heads, of = c.B * c.H, getattr(torch, dtype)
    BLOCK_D = head_options(c.D, of)["BLOCK_D"]
    tiles = 0
    if _PRODUCTS[kernel]:
        tiles = heads * visited_tiles(c.Tq, c.Tk, M, N, c.causal, c.window)
    exponentials = tiles * M * (N + (kernel == "forward"))
    queries, keys, statistics = _TRAFFIC[kernel]
    elements = queries * heads * c.Tq * c.D + keys * c.B * c.Hkv * c.Tk * c.D
    moved = of.itemsize * elements + 4 * statistics * heads * c.Tq
    flops = 2 * _PRODUCTS[kernel] * tiles * M * N * BLOCK_D
    return Estimate(
        kernel,
        f"{M}×{N}" if tiles else f"{M}",
        tiles * M * N,
        tiles * 2 * (M if kernel == "dkdv" else N) * c.D * of.itemsize,
        flops / ceilings["matrix_tflop_s"][dtype] / 1e12,
        exponentials / ceilings["exp_t_s"] / 1e12,
        moved / copy_gb_s(ceilings, moved) / 1e9,
    )


def _shape(case):
    """A case's sizes, causal and window."""
    unknown = {name for name in _MASKS - _COUNTED if case.settings.get(name)}
    if unknown:
        raise ValueError(
            f"estimate: case must have no masks but {', '.join(sorted(_COUNTED))}, got "
            f"{', '.join(sorted(unknown))}; choose another case"
        )
    masks = {"causal": False, "window": None}
    return SimpleNamespace(**CATALOG["attention"].dims(case) | masks | case.settings)


def row_of(kernel, case, dtype="bfloat16", architecture="sm_90"):
    """The row of the configuration table with which a case is launched; delta's tiles are dq's."""
    c = _shape(case)
    return _configurations.find(
        "attention",
        kernel="dq" if kernel == "delta" else kernel,
        architecture=architecture,
        head_dim=next(size for size in HEAD_DIMS if size >= c.D),
        bits=8 * getattr(torch, dtype).itemsize,
        causal=c.causal,
        queries="few" if c.Tq <= FEW_QUERIES else "many",
    )


def h200_ceilings(results=RESULTS):
    """(the ceilings of the newest record of an H200 in a folder, its name), or (H200, None)."""
    found = {path: load_record(path) for path in results.glob("*/*.json")}
    usable = {p: r for p, r in found.items() if "H200" in r["device"] and r["ceilings"]}
    if not usable:
        return H200, None
    newest = max(usable, key=lambda path: usable[path]["started"])
    return usable[newest]["ceilings"]["before"], newest.relative_to(results).as_posix()


def parts(results=RESULTS, record=artefacts.RECORD):
    """{name: Markdown} of the generated parts of docs/attention.md."""
    ceilings, name = h200_ceilings(results)
    return {
        "ceilings": _ceilings(ceilings, name),
        "estimates": _estimates(ceilings),
        "decode": _decode(ceilings),
        "configurations": _configuration_tables(ceilings, artefacts.read(record)["rows"]),
    }


def _ceilings(ceilings, name):
    said = f"record `{name}`" if name else "measured, float32 assumed"
    rows = [
        [chip, figure(copy_gb_s(c, 1 << 30) / 1e3), figure(c["matrix_tflop_s"]["bfloat16"]),
         figure(c["matrix_tflop_s"]["float32"]), figure(c["exp_t_s"]), source]
        for chip, c, source in (("H200", ceilings, said), ("A100 80GB", A100, "datasheet"))
    ]  # fmt: skip
    head = [
        "chip",
        "copy, TB/s",
        "bfloat16 products, TFLOP/s",
        "float32 products, TFLOP/s",
        "exponentials, T/s",
        "source",
    ]
    return _table(head, rows)


def _cases(op, names):
    return [case for name in names for case in CATALOG[op].cases if case.name == name]


def _estimates(ceilings):
    short, long = [], []
    for case in _cases("attention", CASES):
        for direction, kernels in PASSES.items():
            found = [estimate(k, case, row_of(k, case), ceilings) for k in kernels]
            short.append(_direction(case, direction, found, ceilings))
            long += [_kernel(case, found_one) for found_one in found]
    head = ["case", "shape", "", "limit", "µs", "TFLOP/s", "of the matrix roof"]
    said = _table(head, short)
    head = ["case", "kernel", "tile", "visited", "matrix", "exp", "copy", "µs", "limit"]
    return said + _folded("Kernel by kernel", _table(head, long))


def _direction(case, direction, found, ceilings):
    """A line of a case: what its kernels take together, and of what."""
    times = sum(e.overlapped_s for e in found), sum(e.serial_s for e in found)
    flops = CATALOG["attention"].flop_count(case, direction)
    rates = [flops / t / 1e12 for t in reversed(times)]
    shares = [rate / ceilings["matrix_tflop_s"]["bfloat16"] for rate in rates]
    longest = max(found, key=lambda e: e.overlapped_s)
    settings = {k: v for k, v in case.settings.items() if k != "Hkv" or v != case.settings["H"]}
    return [
        f"`{case.name}`",
        shape_words(settings),
        direction,
        longest.limit,
        _range([1e6 * t for t in times]),
        _range(rates),
        _range([100 * share for share in shares]) + "%",
    ]


def _kernel(case, found):
    pairs = CATALOG["attention"].flop_count(case) / (4 * case.settings["D"])
    return [
        f"`{case.name}`",
        found.kernel,
        found.tile,
        f"{found.scores / pairs:.2f}×" if found.scores else NOTHING,
        *(figure(1e6 * t) if t else NOTHING for t in (found.matrix_s, found.exp_s, found.copy_s)),
        _range([1e6 * found.overlapped_s, 1e6 * found.serial_s]),
        found.limit,
    ]


def _decode(ceilings):
    op = CATALOG["paged_attention"]
    rows = []
    for case in _cases("paged_attention", DECODING):
        moved = op.byte_count(case, 2)
        sizes = {k: v for k, v in case.settings.items() if k != "P"}
        copy_s = moved / copy_gb_s(ceilings, moved) / 1e9
        rows.append(
            [f"`{case.name}`", shape_words(sizes), figure(moved / 1e6), figure(1e6 * copy_s)]
        )
    return _table(["case", "shape", "MB", "µs"], rows)


def _configuration_tables(ceilings, compiled):
    """Every row of the configuration table with its estimate, in a table a group."""
    groups = {}
    for row in _configurations.rows("attention"):
        key = row["architecture"], row["bits"], row["queries"]
        groups.setdefault(key, []).append(row)
    said = ""
    # those that most calls use come first, and are in sight
    for key in sorted(groups, key=lambda key: (key[0] != "sm_90", key[1], key[2] != "many")):
        architecture, bits, queries = key
        chip = ceilings if architecture == "sm_90" else A100
        lines = [_configuration(row, chip, compiled) for row in groups[key]]
        head = ["kernel", "D", "mask", "tile", "warps", "stages", "TMA", "registers", "programs",
                "visited", "limit", "ns a million scores", "of the matrix roof",
                "tiles, TB/s"]  # fmt: skip
        title = f"{architecture} ({CHIPS[architecture]}), {bits} bits, {queries} queries"
        table = _table(head, lines)
        if said:
            said += _folded(title, table)
        else:
            said = f"**{title}**\n\n{table}"
    return said


def _configuration(row, ceilings, compiled):
    """A line of a row: on its shape, the time of a million visible scores and the roof's share."""
    (B, H), D, dtype = _PAIRS, row["head_dim"], _DTYPES[row["bits"]]
    Tq = FEW_QUERIES if row["queries"] == "few" else _LENGTH
    case = Case("row", B=B, H=H, Tq=Tq, Tk=_LENGTH, D=D, causal=row["causal"])
    found = estimate(row["kernel"], case, row, ceilings, dtype)
    pairs = CATALOG["attention"].flop_count(case) / (4 * D)
    times = found.overlapped_s, found.serial_s
    useful_s = 2 * _PRODUCTS[row["kernel"]] * pairs * D / ceilings["matrix_tflop_s"][dtype] / 1e12
    return [
        row["kernel"],
        D,
        "causal" if row["causal"] else "full",
        found.tile,
        row["num_warps"],
        row["num_stages"],
        "yes" if row["TMA"] else "no",
        *_compiled(row, dtype, compiled),
        f"{found.scores / pairs:.2f}×",
        found.limit,
        _range([1e15 * t / pairs for t in times]),
        _range([100 * useful_s / t for t in reversed(times)]) + "%",
        figure(found.walked_bytes / found.overlapped_s / 1e12),
    ]


def _compiled(row, dtype, compiled):
    """Registers and programs a multiprocessor on each Triton, by the record of what it compiled."""
    mask = "causal" if row["causal"] else "full"
    key = {
        "op": "attention",
        "case": f"compiled_{mask}_{row['queries']}_d{row['head_dim']}",
        "kernel": _KERNELS[row["kernel"]],
        "tile": f"{row['BLOCK_M']}×{row['BLOCK_N']}×{row['head_dim']}",
        "dtype": dtype,
        "target": row["architecture"],
    }
    those = [r for r in compiled if all(r[name] == value for name, value in key.items())]
    return [
        " / ".join(dict.fromkeys(str(r[name] or NOTHING) for r in those)) or NOTHING
        for name in ("registers", "programs")
    ]


def _range(ends):
    """12.3 – 45.6, or one of them where they are the same."""
    return " – ".join(dict.fromkeys(map(figure, ends)))


def _folded(title, text):
    return f"\n<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
