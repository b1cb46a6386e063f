"""Work over ceilings: the estimated time of a case, and the reason for it."""

import json

import pytest
from gaugeblock.kernels import ceilings
from gaugeblock.kernels.inspect import estimate
from gaugeblock.kernels.inspect.bounds import RATES
from gaugeblock.kernels.inspect.run import Asked

MEASURED = {
    "copy_gb_s": {str(1 << 20): 1000.0, str(1 << 30): 4000.0},
    "matrix_tflop_s": {"bfloat16": 800.0},
    "exp_t_s": 4.0,
}


def row(**changes):
    """A launch of a case that multiplies and takes an exponential for every eight flops."""
    loop = {"section": "loop", "work": {"flop": 8000, "exponentials": 1000, "read_bytes": 0}}
    whole = {"section": "kernel", "work": {"flop": 8000, "exponentials": 9000, "read_bytes": 0}}
    work = {"flop": 8e12, "read_bytes": 3 << 30, "written_bytes": 1 << 30}
    return {
        "op": "attention", "case": "large", "dtype": "bfloat16", "target": "sm_90",
        "kernel": "_attention_fwd_kernel", "launched": 1000, "bounds": [loop, whole],
        "instructions": {"HGMMA": 1, "MUFU.EX2": 1}, "product_units": ["HGMMA"],
        "work": {"fwd": work},
    } | changes  # fmt: skip


def estimated(*rows, file=None):
    estimate.add(rows, file)
    return rows[0]["estimate"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps(MEASURED))
    return path


def test_the_reason_is_what_takes_longest(file):
    found = estimated(row(), file=file)["fwd"]
    assert found["times_ms"] == {
        "bandwidth": pytest.approx((4 << 30) / 4000e6),
        "matrix": pytest.approx(10.0),
        # 10¹² exponentials at 4 · 10¹² a second
        "exp": pytest.approx(250.0),
        "latency": estimate.LATENCY_MS,
    }
    assert (found["time_ms"], found["reason"]) == (pytest.approx(250.0), "exp")
    assert found["exponentials"] == 10**12
    assert found["intensity"] == pytest.approx(8e12 / (4 << 30))
    assert found["ridge"] == pytest.approx(200.0)
    without = [{"section": "kernel", "work": {"flop": 8000, "exponentials": 0, "read_bytes": 0}}]
    assert estimated(row(bounds=without), file=file)["fwd"]["reason"] == "matrix"
    little = {"flop": 8e9, "read_bytes": 3 << 30, "written_bytes": 1 << 30}
    assert estimated(row(work={"fwd": little}), file=file)["fwd"]["reason"] == "bandwidth"
    nothing = {"flop": 8, "read_bytes": 8, "written_bytes": 8}
    assert estimated(row(work={"fwd": nothing}), file=file)["fwd"]["reason"] == "latency"


def test_a_launch_that_does_not_fill_the_chip(file):
    found = estimated(row(launched=33), file=file)["fwd"]
    assert found["share"] == 0.25
    assert found["times_ms"]["matrix"] == pytest.approx(40.0)
    assert found["times_ms"]["bandwidth"] == pytest.approx((4 << 30) / 4000e6)


def test_without_products_exponentials_go_with_what_is_read(file):
    loop = {"section": "loop", "work": {"flop": 0, "exponentials": 64, "read_bytes": 128}}
    found = estimated(row(bounds=[loop]), file=file)["fwd"]
    assert found["exponentials"] == (3 << 30) // 2


@pytest.mark.parametrize(
    "changes",
    [
        # warps that differ in what they run; a product without a shape; products beside the units
        {"bounds": None},
        {"bounds": [{"section": "loop", "work": {"flop": None, "exponentials": 8}}]},
        {"product_units": ["FFMA"]},
        # after the last step of a product alone, and in a loop before it that has none
        {
            "bounds": [
                {"section": "loop", "work": {"flop": 8000, "exponentials": 0, "read_bytes": 128}},
                {"section": "loop", "work": {"flop": 0, "exponentials": 64, "read_bytes": 128}},
                {"section": "kernel", "work": {"flop": 8000, "exponentials": 99, "read_bytes": 0}},
            ]
        },
    ],
)
def test_exponentials_that_the_code_does_not_show_are_not_known(file, changes):
    shown = row(**changes)
    found = estimated(shown, file=file)["fwd"]
    assert (found["exponentials"], found["times_ms"]["exp"]) == (None, None)
    assert (found["time_ms"], found["reason"]) == (pytest.approx(10.0), "matrix")
    (line,) = estimate.table([shown]).rows
    assert "–" in line
    # without an exponential there is nothing to know
    none = row(**changes, instructions={"HGMMA": 1})
    assert estimated(none, file=file)["fwd"]["exponentials"] == 0


def test_a_kernel_of_both_directions_is_in_both(file):
    work = {"fwd": row()["work"]["fwd"], "bwd": row()["work"]["fwd"]}
    found = estimated(row(work=work, kernel="_loss_fwd_bwd_kernel"), file=file)
    assert found["fwd"] == found["bwd"]
    assert found["fwd"]["exponentials"] == 10**12


def test_a_direction_has_its_own_kernels(file):
    loop = {"section": "loop", "work": {"flop": 8, "exponentials": 8, "read_bytes": 0}}
    work = {"fwd": row()["work"]["fwd"], "bwd": row()["work"]["fwd"]}
    found = estimated(
        row(work=work), row(work=work, kernel="_attention_bwd_dq_kernel", bounds=[loop]), file=file
    )
    assert found["fwd"]["exponentials"] == 10**12
    assert found["bwd"]["exponentials"] == 8 * 10**12


def test_the_datasheet_stands_where_nothing_was_measured():
    found = estimated(row())["fwd"]
    assert found["ceilings"] == "datasheet of H200"
    assert found["times_ms"]["matrix"] == pytest.approx(8e3 / 989)
    assert found["times_ms"]["bandwidth"] == pytest.approx((4 << 30) / 4800e6)
    # no such ceiling; a user's kernel, whose work nobody knows; AMD's chips
    assert estimated(row(dtype="float64")) is None
    assert estimated(row(work=None)) is None
    assert estimated(row(target="gfx942")) is None


def test_the_table_has_a_line_a_direction(file):
    rows = [row(), row(kernel="_attention_fwd_merge_kernel"), row(target="gfx942")]
    estimate.add(rows[:2], file)
    (line,) = estimate.table(rows).rows
    assert line[:4] == ("attention", "large", "sm_90", "fwd")
    assert line[-2:] == ("2.5e+05", "exp")


@pytest.mark.parametrize("target", ceilings.CHIPS)
def test_exponentials_of_the_datasheet_are_those_of_the_pipes(target):
    rates = RATES[target]
    assert ceilings.CHIPS[target].adds_per_exp == rates.fp32 / rates.exp


def test_ceilings_are_read_from_a_record_too(tmp_path, file):
    assert ceilings.read(file) == (MEASURED, None)
    record = {"ceilings": {"before": MEASURED}, "machine": {"clock_overhead_ms": 0.004}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert ceilings.read(tmp_path / "record.json") == (MEASURED, 0.004)
    found = estimated(row(), file=tmp_path / "record.json")["fwd"]
    assert found["times_ms"]["latency"] == 0.004


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ceilings": null}', '{"ceilings": {"before": {}}}',
     json.dumps(MEASURED | {"exp_t_s": 0}), json.dumps(MEASURED | {"copy_gb_s": {}}),
     json.dumps(MEASURED | {"copy_gb_s": {"much": 1.0}})],
)  # fmt: skip
def test_what_holds_no_ceilings_is_refused(tmp_path, text):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json must hold copy_gb_s, matrix_tflop_s and"):
        ceilings.read(tmp_path / "wrong.json")


def test_a_copy_s_rate_lies_between_those_that_were_measured():
    rates = [ceilings.copy_gb_s(MEASURED, n) for n in (0, 1 << 10, 1 << 20, 1 << 25, 1 << 31)]
    assert rates == [1000.0, 1000.0, 1000.0, pytest.approx(2500.0), 4000.0]


def test_ceilings_without_the_dtype_are_refused(file):
    Asked(["ffn"], ceilings=file)
    with pytest.raises(ValueError, match="must have the rate of float16 products, it has bfloat16"):
        Asked(["ffn"], dtype="float16", ceilings=file)
