"""Estimates of the attention kernels count what is visited, and docs/attention.md holds them."""

import json
import re

import numpy as np
import pytest
import torch
from gaugeblock.benchmarks import estimates, readme
from gaugeblock.kernels import _configurations
from gaugeblock.reference._attention import visible_keys
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case

from tests.helpers import CHECKOUT
from tests.invented_records import CEILINGS, record

OP = CATALOG["attention"]
PAGE = CHECKOUT / "docs" / "attention.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = {"BLOCK_M": 64, "BLOCK_N": 32}


def case(T=1024, D=64, **settings):
    return Case("invented", B=2, H=4, Tq=T, Tk=T, D=D, **settings)


def of_record(name):
    return next(c for c in OP.cases if c.name == name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 500])
def test_visited_tiles_are_those_that_show_something(causal, window):
    rng = np.random.default_rng(0)
    for Tq, Tk in [(1, 1), (64, 64), (65, 63), *rng.integers(1, 200, (30, 2)).tolist()]:
        shown = visible_keys(Tq, Tk, causal=causal, window=window)[0, 0]
        for M, N in ((16, 32), (64, 16), (128, 128)):
            rows, columns = np.nonzero(shown)
            tiles = set(zip((rows // M).tolist(), (columns // N).tolist()))
            assert estimates.visited_tiles(Tq, Tk, M, N, causal, window) == len(tiles)


def test_the_work_of_a_known_case():
    # two heads of one tile: 2 products of 64·32 scores over 64, of which nothing is hidden
    one = Case("one_tile", B=1, H=2, Tq=64, Tk=32, D=48)
    unit = {
        "matrix_tflop_s": {"bfloat16": 1e-12},
        "exp_t_s": 1e-12,
        "copy_gb_s": {"1": 1e-9},
    }
    found = {k: estimates.estimate(k, one, ROW, unit) for k in ("forward", "delta", "dq", "dkdv")}
    scores = 2 * 64 * 32
    assert {e.scores for k, e in found.items() if k != "delta"} == {scores}
    assert [e.matrix_s / (2 * scores * 64) for e in found.values()] == [2, 0, 3, 4]
    assert found["forward"].exp_s == scores + 2 * 64
    assert found["dq"].exp_s == found["dkdv"].exp_s == scores
    q, k, lse = 2 * 2 * 64 * 48, 2 * 2 * 32 * 48, 4 * 2 * 64
    assert [e.copy_s for e in found.values()] == [
        2 * q + 2 * k + lse, 2 * q + lse, 3 * q + 2 * k + 2 * lse, 2 * q + 4 * k + 2 * lse,
    ]  # fmt: skip
    # of a tile of keys, queries and their gradients are walked over
    assert found["forward"].walked_bytes == found["dq"].walked_bytes == 2 * k
    assert found["dkdv"].walked_bytes == 2 * q


def test_both_bounds_and_the_limit():
    for matrix_s, exp_s, copy_s, overlapped_s, serial_s, limit in (
        (3, 2, 1, 3, 5, "matrix"),
        (2, 3, 1, 3, 5, "exp"),
        (2, 3, 4, 4, 5, "copy"),
        (2, 3, 9, 9, 9, "copy"),
    ):
        found = estimates.Estimate("dq", "64×32", 1, 1, matrix_s, exp_s, copy_s)
        assert (found.overlapped_s, found.serial_s) == (overlapped_s, serial_s)
        assert found.limit == limit


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_estimates_grow_as_they_must(kernel):
    def serial_s(case, row=ROW, dtype="bfloat16"):
        return estimates.estimate(kernel, case, row, estimates.H200, dtype).serial_s

    full = serial_s(case())
    assert serial_s(case(T=2048)) == pytest.approx(4 * full)
    # hidden scores of the diagonal's tiles are computed
    assert 0.5 < serial_s(case(causal=True)) / full < 0.6
    assert serial_s(case(causal=True, window=64)) < 0.2 * full
    assert serial_s(case(causal=True), {"BLOCK_M": 128, "BLOCK_N": 128}) > serial_s(
        case(causal=True)
    )
    assert serial_s(case(D=65)) == serial_s(case(D=128)) > full
    assert serial_s(case(), dtype="float32") > 5 * full


def test_a_mask_that_is_not_counted_is_refused():
    for settings in ({"lengths": (9, 8)}, {"window": 4, "global_tokens": 2}, {"align": "top_left"}):
        with pytest.raises(ValueError, match="no masks but causal, window, got"):
            estimates.estimate("dq", case(**settings), ROW, estimates.H200)


def test_cases_are_launched_as_the_table_says():
    few = Case("few", B=1, H=1, Tq=16, Tk=500, D=65, causal=True)
    row = estimates.row_of("dkdv", few, "float32", "sm_80")
    assert row in _configurations.rows("attention")
    wanted = {"kernel": "dkdv", "architecture": "sm_80", "head_dim": 128, "bits": 32,
              "causal": True, "queries": "few"}  # fmt: skip
    assert wanted.items() <= row.items()
    many = estimates.row_of("delta", case(window=9))
    wanted = {"kernel": "dq", "architecture": "sm_90", "head_dim": 64, "bits": 16,
              "causal": False, "queries": "many"}  # fmt: skip
    assert wanted.items() <= many.items()


def test_a_share_of_the_roof_is_of_the_catalogs_flops():
    full = of_record("full_4k_d128")
    found = [
        estimates.estimate(k, full, estimates.row_of(k, full), estimates.H200)
        for k in estimates.PASSES["bwd"]
    ]
    *_, rates, shares = estimates._direction(full, "bwd", found, estimates.H200)
    best = float(rates.split(" – ")[1])
    total_s = sum(e.overlapped_s for e in found)
    assert best == pytest.approx(OP.flop_count(full, "bwd") / total_s / 1e12, rel=5e-3)
    # five products are useful where seven are done
    assert 0.68 < best / 785 < 5 / 7
    assert float(shares.split(" – ")[1][:-1]) == pytest.approx(100 * best / 785, abs=0.1)


def test_every_row_of_the_table_has_an_estimate():
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in estimates.parts()["configurations"].splitlines()
        if re.match(r"\| (forward|dkdv|dq) ", line)
    ]
    rows = _configurations.rows("attention")
    assert len(lines) == len(rows)
    wanted = sorted(
        (r["kernel"], str(r["head_dim"]), "causal" if r["causal"] else "full",
         f"{r['BLOCK_M']}×{r['BLOCK_N']}", str(r["num_warps"]), str(r["num_stages"]),
         "yes" if r["TMA"] else "no")
        for r in rows
    )  # fmt: skip
    assert sorted(tuple(line[:7]) for line in lines) == wanted
    for line in lines:
        limit, times, shares, rate = line[10:]
        assert limit in ("matrix", "exp", "copy")
        ends = [float(x.replace(",", "")) for x in times.split(" – ")]
        assert 0 < ends[0] <= ends[-1]
        assert 0 < float(shares.strip("%").split(" – ")[-1]) <= 100
        assert float(rate) > 0


def test_registers_are_those_of_the_row_as_it_is():
    row = _configurations.rows("attention")[0]
    compiled = {
        "op": "attention", "kernel": "_attention_fwd_kernel", "dtype": "bfloat16",
        "case": f"compiled_{'causal' if row['causal'] else 'full'}_{row['queries']}_d64",
        "tile": f"{row['BLOCK_M']}×{row['BLOCK_N']}×64", "target": row["architecture"],
        "registers": 100, "programs": 3,
    }  # fmt: skip
    both = [compiled, {**compiled, "registers": 120}]
    assert (row["kernel"], row["head_dim"], row["bits"]) == ("forward", 64, 16)
    assert estimates._compiled(row, "bfloat16", both) == ["100 / 120", "3"]
    for other in ({"tile": "8×8×64"}, {"case": "full"}, {"dtype": "float16"}):
        assert estimates._compiled(row, "bfloat16", [{**compiled, **other}]) == ["–", "–"]
    cases = {c.name for c in OP.cases if "aot" in c.tags}
    for row in _configurations.rows("attention"):
        mask = "causal" if row["causal"] else "full"
        assert f"compiled_{mask}_{row['queries']}_d{row['head_dim']}" in cases


def test_the_newest_record_of_an_h200_takes_the_place_of_the_constants(tmp_path):
    assert estimates.h200_ceilings(tmp_path) == (estimates.H200, None)
    assert "measured, float32 assumed" in estimates.parts(tmp_path)["ceilings"]
    found = CEILINGS | {"matrix_tflop_s": {"bfloat16": 700.0, "float32": 50.0}}
    for name, started, device, ceilings in (
        ("old", "2026-01-01T00:00:00+00:00", "NVIDIA H200", CEILINGS),
        ("new", "2026-01-02T00:00:00+00:00", "NVIDIA H200", found),
        ("other", "2026-01-03T00:00:00+00:00", "Invented", CEILINGS),
        ("without", "2026-01-04T00:00:00+00:00", "NVIDIA H200", None),
    ):
        measured = ceilings and {"before": ceilings, "after": None, "drift": None}
        made = record([], started=started, device=device, ceilings=measured)
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(made))
    assert estimates.h200_ceilings(tmp_path) == (found, "new/record.json")
    said = estimates.parts(tmp_path)
    assert "| H200 | 0.0600 | 700 | 50.0 | 0.0100 | record `new/record.json` |" in said["ceilings"]
    assert said["estimates"] != estimates.parts()["estimates"]


def test_the_page_holds_the_estimates():
    page = PAGE.read_text()
    assert readme.pages()[PAGE] == estimates.parts()
    assert readme.fill(page, estimates.parts()) == page, "run make readme"


def test_decoding_takes_as_long_as_its_bytes(tmp_path):
    op = CATALOG["paged_attention"]
    moved = op.byte_count(next(c for c in op.cases if c.name == "long_decode"), 2)
    line = next(x for x in estimates.parts(tmp_path)["decode"].splitlines() if "long_decode" in x)
    assert moved > 1e9
    took = float(line.split("|")[-2].replace(",", ""))
    assert took == pytest.approx(moved / 4.3e6, rel=5e-3)


def test_the_pages_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    given = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block.replace('"cuda"', f'"{DEVICE}"'), given)
    assert given["lse"].shape == (1, 4, 200)
    assert given["q"].shape == (2, 8, 1, 64)


def test_the_page_compares_every_feature_in_every_column():
    text = PAGE.read_text().split("## Beside others")[1]
    rows = [
        [c.strip() for c in line.strip().strip("|").split(" | ")]
        for line in text.split("\n\n<details>")[0].splitlines()
        if line.startswith("|")
    ]
    assert len(rows) > 30
    assert {len(row) for row in rows} == {6}
    assert all(all(row) for row in rows)
    sources = text.split("<summary>Sources</summary>")[1].split("</details>")[0]
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", sources, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = {int(n) for n in re.findall(r"\[(\d+)\]", text)}
    # those of a range [8]–[12] are cited too
    for first, last in re.findall(r"\[(\d+)\](?:–| to )\[(\d+)\]", text):
        cited |= set(range(int(first), int(last) + 1))
    assert cited == set(numbers)
