"""The budget of a training step counts what the catalog counts, and docs/step.md holds it."""

import json

import pytest
from gaugeblock.benchmarks import estimates, readme, step_budget
from gaugeblock.gpt import GPT, GPTConfig
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case

from tests.helpers import CHECKOUT
from tests.invented_records import CEILINGS, record

PAGE = CHECKOUT / "docs" / "step.md"
# a flop takes a second at a share of 0.92, a byte nothing; and the other way round
FLOPS = {"matrix_tflop_s": {"bfloat16": 1e-12}, "exp_t_s": 1e30, "copy_gb_s": {"1": 1e30}}
BYTES = {"matrix_tflop_s": {"bfloat16": 1e30}, "exp_t_s": 1e30, "copy_gb_s": {"1": 1e-9}}
M, C, V, N = 32 * 1024, 768, 50257, 124_439_808


def lines(ceilings=estimates.H200):
    return {(line.name, line.direction): line for line in step_budget.budget(ceilings)}


def test_the_products_of_each_kernel():
    seconds = {key: line.seconds[1] * 0.92 for key, line in lines(FLOPS).items()}
    for name, forward in (
        ("linear, q k v", 2 * M * C * 3 * C),
        ("linear, out", 2 * M * C * C),
        ("ffn", 2 * 2 * M * C * 4 * C),
        ("linear_cross_entropy", 2 * M * C * V),
    ):
        assert seconds[name, "fwd"] == pytest.approx(forward)
        # the logits are computed again
        again = forward * (name == "linear_cross_entropy")
        assert seconds[name, "bwd"] == pytest.approx(2 * forward + again)
    # six flops a weight that takes part in products, eight of the head's
    token = sum(
        line.calls * line.flops / line.tokens
        for (name, _), line in lines().items()
        if name.startswith(("linear", "ffn"))
    )
    assert token == 6 * 12 * 12 * C * C + 8 * V * C


def test_the_bytes_of_each_kernel():
    rows, moved = 2 * M * C, {}
    for key, line in lines(BYTES).items():
        if key[0] != "attention":
            moved[key] = line.seconds[1] * 0.85
            assert moved[key] == pytest.approx(line.moved_bytes)
            assert line.limit == "copy"
    wanted = {
        ("linear, q k v", "fwd"): 4 * rows + 2 * (3 * C * C + 3 * C),
        ("residual_layer_norm", "fwd"): 4 * rows + 2 * 2 * C,
        ("residual_layer_norm", "bwd"): 4 * rows + 2 * 3 * C,
        ("heads to rows", "fwd"): 2 * rows,
        ("heads to rows", "bwd"): 6 * rows,
        ("weights to bfloat16", "fwd"): 6 * N,
        ("gradients to float32, added", "bwd"): 18 * N,
        ("gradients of wte, added", "bwd"): 12 * V * C,
        ("norm of the gradients", "step"): 4 * N,
        ("adamw", "step"): 28 * N,
    }
    assert {key: moved[key] for key in wanted} == pytest.approx(wanted)


def test_the_kernels_of_a_step_and_how_often_they_run():
    found = lines()
    calls = {name: {} for name, _ in found}
    for (name, direction), line in found.items():
        calls[name][direction] = line.calls
        assert line.tokens == (2**19 if direction == "step" else M)
    assert calls.pop("weights to bfloat16") == {"fwd": 1}
    assert calls.pop("gradients to float32, added") == {"bwd": 1}
    assert calls.pop("gradients of wte, added") == {"bwd": 1}
    assert calls.pop("norm of the gradients") == calls.pop("adamw") == {"step": 1}
    many = {
        "embedding": 1, "layer_norm, the first": 1, "linear, q k v": 12, "attention": 12,
        "linear, out": 12, "ffn": 12, "residual_layer_norm": 24, "linear_cross_entropy": 1,
        "heads to rows": 12,
    }  # fmt: skip
    assert calls == {name: {"fwd": n, "bwd": n} for name, n in many.items()}


def test_a_line_is_what_a_hand_computes():
    qkv = lines()["linear, q k v", "bwd"]
    flops = 2 * 2 * 32_768 * 768 * 2304
    assert qkv.limit == "matrix"
    assert qkv.seconds[0] == qkv.seconds[1] == pytest.approx(flops / (0.92 * 785e12))
    assert qkv.us_a_token[0] == pytest.approx(12 * flops / (0.92 * 785e6) / 32_768)
    adamw = lines()["adamw", "step"]
    assert adamw.us_a_token[1] == pytest.approx(28 * N / (0.85 * 4.3e6) / 524_288)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_attention_takes_its_own_estimate(direction):
    case = Case("invented", B=32, H=12, Tq=1024, Tk=1024, D=64, causal=True)
    found = [
        estimates.estimate(k, case, estimates.row_of(k, case), estimates.H200)
        for k in estimates.PASSES[direction]
    ]
    line = lines()["attention", direction]
    assert line.seconds == (sum(e.overlapped_s for e in found), sum(e.serial_s for e in found))
    assert line.seconds[0] < line.seconds[1]
    assert line.flops == CATALOG["attention"].flop_count(case, direction)


def test_the_sum_is_that_of_its_lines_and_under_what_training_must_reach(tmp_path):
    found = list(lines().values())
    for end, total in enumerate(step_budget.total_us(found)):
        assert total == pytest.approx(
            sum(1e6 * line.calls * line.seconds[end] / line.tokens for line in found)
        )
        assert 1 < total < 1e6 / 600_000
    said = step_budget.parts(tmp_path)["budget"]
    assert f"| **{estimates._range(step_budget.total_us(found))}** |" in said
    assert ", under the 1.67 µs of 600k tokens a second" in said


def test_where_products_are_too_slow_it_says_so(tmp_path):
    slow = CEILINGS | {"matrix_tflop_s": {"bfloat16": 500.0, "float32": 50.0}}
    slow |= {"copy_gb_s": {"1073741824": 4300.0}, "exp_t_s": 3.9}
    (tmp_path / "h200").mkdir()
    made = record([], device="NVIDIA H200", ceilings={"before": slow, "after": None, "drift": None})
    (tmp_path / "h200" / "record.json").write_text(json.dumps(made))
    said = step_budget.parts(tmp_path)
    assert "not under the 1.67 µs" in said["budget"]
    assert "| ceilings | record `h200/record.json` |" in said["assumptions"]
    assert "0.92 of 500 TFLOP/s" in said["assumptions"]


def test_at_the_rate_that_is_needed_the_target_is_met():
    needed = step_budget.needed_tflop_s(list(lines().values()))
    total = 0
    for (name, _), line in lines().items():
        if line.limit == "matrix" and name != "attention":
            total += line.calls * line.flops / line.tokens / needed / 1e6
        else:
            total += line.us_a_token[1]
    assert total == pytest.approx(1e6 / 600_000)


def test_what_may_be_wrong_adds_up():
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in step_budget.parts()["doubts"].splitlines()[2:]
        if line.startswith("|")
    ]
    most = [float(line[1].split(" – ")[1]) for line in table]
    assert len(most) == 5
    assert min(most) == most[0]
    # two bytes of each logit's gradient, written once and read twice
    assert most[3] - most[0] == pytest.approx(3 * 2 * V / (0.85 * 4.3e6), abs=0.011)
    assert most[4] - most[0] == pytest.approx(sum(x - most[0] for x in most[1:4]), abs=0.03)
    for line, us in zip(table, most):
        assert float(line[2].split(" – ")[0]) == pytest.approx(1e3 / us, rel=5e-3)


def test_parameters_are_those_of_the_model():
    assert step_budget.parameters() == N
    for config in (
        GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11),
        GPTConfig(n_layer=1, n_head=1, n_embd=6, block_size=3, vocab_size=5, n_inner=7),
    ):
        model = GPT(config, impl="eager")
        assert step_budget.parameters(config) == sum(p.numel() for p in model.parameters())


def test_the_page_holds_the_budget():
    page = PAGE.read_text()
    assert readme.pages()[PAGE] == step_budget.parts()
    assert readme.fill(page, step_budget.parts()) == page, "run make readme"
