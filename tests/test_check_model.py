"""Whole models: right ones pass, wrong ones are named by the tensor that is wrong."""

import functools
import json
import time

import pytest
import torch
import torch.nn.functional as F
from gaugeblock.gpt import GPT
from gaugeblock.gpt.optimizer import AdamW
from gaugeblock.kernels._launch import LAUNCHES
from gaugeblock.reference.oracle import check_model
from gaugeblock.reference.oracle import model as oracle
from gaugeblock.reference.oracle.model import MODEL
from gaugeblock.reference.oracle.result import describe
from safetensors.torch import load_file
from torch import nn

from examples.transformers_model import Model as Transformers
from tests.helpers import CHECKOUT, gaugeblock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {case.name for case in MODEL.cases} | {"training"}


@pytest.fixture(autouse=True, scope="module")
def kept_budgets():
    """What a case must give depends on no candidate: it is computed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_Expectation", "_TrainingExpectation", "_training"):
            patch.setattr(oracle, name, functools.cache(getattr(oracle, name)))
        yield


def eager(directory):
    return GPT.from_pretrained(directory, impl="eager")


class Plain(nn.Module):
    """A GPT-2 in plain torch with (out, in) matrices, and the bugs that a model may have."""

    def __init__(self, directory, bug=None):
        super().__init__()
        self.bug, self.config = bug, json.loads((directory / "config.json").read_text())
        for key, w in load_file(directory / "model.safetensors").items():
            self._place(key.removeprefix("transformer."), w.T if ".c_" in key and w.ndim > 1 else w)

    def _place(self, key, weight):
        *path, name = key.split(".")
        module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(name, nn.Parameter(weight.contiguous()))

    def forward(self, idx, targets=None):
        bug, eps = self.bug, self.config["layer_norm_epsilon"]
        if bug == "eps 1e-6":
            eps = 1e-6

        def norm(x, m):
            wide = F.layer_norm(x.float(), x.shape[-1:], m.weight.float(), m.bias.float(), eps)
            return wide.to(x.dtype)

        positions = torch.arange(idx.shape[1]) + (bug == "positions shifted")
        h = self.wte.weight[idx] + self.wpe.weight[positions]
        if bug == "dropout left on" or (bug == "dropout in training" and self.training):
            h = F.dropout(h, 0.1)
        for i, block in enumerate(self.h.children()):
            x = norm(h, block.ln_1)
            h = (x if bug == "residual after the norm" else h) + self._attend(x, block.attn, i)
            y = self._feed(norm(h, block.ln_2), block.mlp)
            last = i == self.config["n_layer"] - 1
            h = h + (y.detach() if bug == "last ffn detached" and last else y)
        head = self.wte if self.config["tie_word_embeddings"] else self.lm_head
        if bug == "untied head ignored":
            head = self.wte
        w = head.weight.detach() if bug == "head detached" else head.weight
        logits = norm(h, self.ln_f) @ w.T
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss * idx.shape[1] if bug == "loss averaged over B" else loss

    def _attend(self, x, m, layer):
        bug, (B, T, C), H = self.bug, x.shape, self.config["n_head"]
        heads = F.linear(x, m.c_attn.weight, m.c_attn.bias).view(B, T, 3, H, C // H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if bug == "keys detached":
            k = k.detach()
        scale = (C // H) ** -0.5 if self.config["scale_attn_weights"] else 1.0
        if self.config["scale_attn_by_inverse_layer_idx"] and bug != "layer scale ignored":
            scale /= layer + 1
        hidden = torch.ones(T, T).triu(2 if bug == "one future key" else 1).bool()
        scores = (scale * q.float() @ k.float().mT).masked_fill(hidden, -torch.inf)
        p = scores.to(torch.bfloat16 if bug == "softmax in bfloat16" else scores.dtype).softmax(-1)
        o = (p.to(x.dtype) @ v).transpose(1, 2).reshape(B, T, C)
        return F.linear(o, m.c_proj.weight, None if bug == "no c_proj bias" else m.c_proj.bias)

    def _feed(self, x, m):
        name = self.config["activation_function"]
        form = "none" if name == "gelu" or self.bug == "exact gelu" else "tanh"
        z = F.linear(x, m.c_fc.weight, m.c_fc.bias)
        a = F.relu(z) if name == "relu" else F.gelu(z, approximate=form)
        return F.linear(a, m.c_proj.weight, m.c_proj.bias)


def wrong(report):
    return {r.output for r in report.failures}


@pytest.mark.parametrize(
    "load", [eager, Transformers.from_pretrained], ids=["gaugeblock", "transformers"]
)
def test_right_models_pass(load):
    report = check_model(load)
    assert report.passed, report.failures
    assert {r.case for r in report.results} == CASES
    logits = [r.discrimination for r in report.results if r.output in ("logits", "loss", "losses")]
    assert min(logits) > 1e5
    plain = {r.output for r in report.results if r.case == "plain"}
    assert plain == {"logits", "loss"} | {f"d{key}" for key in MODEL.floating()[:-1]}
    assert [r.output for r in report.results if r.case == "training"] == ["losses"]


class Fused(GPT):
    """The loss straight from the head."""

    def forward(self, idx, targets=None):
        return super().forward(idx, targets, fused_loss=targets is not None)


def test_ten_losses_of_training_on_every_kernel(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(AdamW, impl="triton"))
    before = LAUNCHES.copy()
    report = check_model(
        lambda directory: Fused.from_pretrained(directory, impl="triton"), expression="training",
        device=DEVICE,
    )  # fmt: skip
    (losses,) = report.results
    assert losses.passed, describe(losses)
    launched = set(LAUNCHES - before)
    wanted = {
        "_embedding_fwd_kernel", "_layer_norm_fwd_kernel", "_attention_fwd_kernel",
        "_product_kernel", "_linear_cross_entropy_parts_kernel", "_adamw_list_kernel",
    }  # fmt: skip
    assert wanted <= launched


def test_right_models_pass_in_16_bits():
    report = check_model(eager, dtypes=("bfloat16",), backward=False)
    assert report.passed, report.failures
    assert {r.case for r in report.results} == CASES - {"training"}
    assert min(r.discrimination for r in report.results if r.output == "logits") > 10
    report = check_model(eager, dtypes=("bfloat16",), expression="plain or relu or training")
    assert report.passed, report.failures
    assert {r.output for r in report.results if r.case == "relu"} == {"logits", "loss"}
    assert len([r for r in report.results if r.case == "plain"]) == 30
    left_out = [line for line in report.not_checked if "in bfloat16" in line]
    assert {line.split(" ")[0] for line in left_out} == {"relu:", "training"}


def test_matrices_may_be_transposed():
    report = check_model(Plain)
    assert report.passed, report.failures
    assert {r.case for r in report.results} == CASES
    report = check_model(
        Plain, dtypes=("bfloat16",), expression="plain or untied or scaled_by_layer"
    )
    assert report.passed, report.failures


# a bias of the keys moves all scores of a query alike: its gradient is 0
ATTENTION = {"dh.0.attn.c_attn.weight", "dh.1.attn.c_attn.weight"}
FFN = {f"dh.1.mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")}


# a bug, the case that shows it, tensors that are wrong there and tensors that are right
BUGS = [
    ("head detached", "plain", {"dwte.weight"}, {"logits", "loss", "dwpe.weight"}),
    ("no c_proj bias", "plain", {"logits", "dh.0.attn.c_proj.bias"}, set()),
    ("exact gelu", "plain", {"logits"}, set()),
    ("eps 1e-6", "small_weights", {"logits", "dwte.weight"}, set()),
    ("positions shifted", "plain", {"logits", "dwpe.weight"}, set()),
    ("one future key", "plain", {"logits"}, set()),
    ("dropout left on", "plain", {"logits"}, set()),
    ("dropout in training", "training", {"losses"}, set()),
    ("residual after the norm", "plain", {"logits"}, set()),
    ("softmax in bfloat16", "plain", {"logits"}, set()),
    ("loss averaged over B", "plain", {"loss", "dwte.weight"}, {"logits"}),
    ("last ffn detached", "plain", FFN, {"logits", "loss", "dln_f.weight"}),
    ("keys detached", "plain", ATTENTION, {"logits", "loss", *FFN}),
    ("layer scale ignored", "scaled_by_layer", {"logits", *ATTENTION}, set()),
    ("untied head ignored", "untied", {"logits", "dlm_head.weight"}, set()),
]
# less than what 16 bits resolve, or seen in training alone
FINE = {"exact gelu", "eps 1e-6", "softmax in bfloat16", "dropout in training"}
BUGS_16 = [row for row in BUGS if row[0] not in FINE]


@pytest.mark.parametrize(
    ("bug", "case", "named", "right", "dtype"),
    [(*row, "float32") for row in BUGS] + [(*row, "bfloat16") for row in BUGS_16],
)
def test_wrong_models_are_named_by_their_tensor(bug, case, named, right, dtype):
    torch.manual_seed(0)
    report = check_model(lambda d: Plain(d, bug), dtypes=(dtype,), expression=case)
    assert named <= wrong(report)
    assert not right & wrong(report)
    if bug in ("last ffn detached", "no c_proj bias"):
        # the wrong tensors are told to be zero
        assert {r.output for r in report.failures if r.hint.startswith("all zero")} >= (
            named - {"logits"}
        )


def test_a_wrong_activation_is_wrong_in_its_case_alone():
    report = check_model(lambda d: Plain(d, "exact gelu"), expression="plain or gelu or relu")
    assert {r.case for r in report.failures} == {"plain"}


class Broken(Plain):
    """A model that answers in a wrong form."""

    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        return {
            "one": lambda: logits,
            "last position": lambda: (logits[:, -1:], loss),
            "no loss": lambda: (logits, None),
            "nan": lambda: (logits * torch.nan, loss * torch.nan),
            "hangs": lambda: time.sleep(60),
            "exits": lambda: exit(3),
            "double": lambda: (logits.double(), loss),
        }[self.bug]()


def separate_head(directory):
    model = Plain(directory)
    model._place("lm_head.weight", model.wte.weight.detach().clone())
    return model


def nameless(directory):
    model = Plain(directory)
    del model.h._modules["1"].ln_2.bias
    return model


def additional(directory):
    model = Plain(directory)
    model._place("h.0.attn.gate", torch.ones(3))
    return model


def unread(directory):
    model = Plain(directory)
    nn.init.normal_(model.wpe.weight)
    return model


@pytest.mark.parametrize(
    ("load", "kind", "hint"),
    [
        (lambda directory: 1 / 0, "exception", "ZeroDivisionError"),
        (lambda directory: directory, "form", "load must return an nn.Module, returned PosixPath"),
        (nameless, "form", "lacks h.1.ln_2.bias"),
        (additional, "form", "has h.0.attn.gate"),
        (separate_head, "form", "lm_head.weight must be wte.weight itself"),
        (unread, "form", "wpe.weight must hold what the file holds"),
        (lambda directory: Broken(directory, "one"), "form", "must return (logits, loss)"),
        (lambda directory: Broken(directory, "no loss"), "form", "loss must be a tensor"),
        (lambda directory: Broken(directory, "last position"), "shape", "(2, 19, 67)"),
        (lambda directory: Broken(directory, "nan"), "nonfinite", "all NaN"),
        (lambda directory: Broken(directory, "double"), "dtype", "must be float32"),
        (lambda directory: Broken(directory, "hangs"), "timeout", "within 1 s"),
        (lambda directory: Broken(directory, "exits"), "exception", "SystemExit"),
    ],
)
def test_a_model_that_breaks_is_a_failure_of_its_case(load, kind, hint):
    report = check_model(load, expression="plain", timeout=1, backward=False)
    assert not report.passed
    assert report.failures[0].kind == kind
    assert hint in report.failures[0].hint


def test_logits_may_come_in_a_call_of_their_own():
    class Fused(Plain):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return (None, loss) if targets is not None else (logits, None)

    report = check_model(Fused, expression="one_token")
    assert report.passed, report.failures


def test_a_model_without_gradients_has_zero_gradients():
    def frozen(directory):
        return Plain(directory).requires_grad_(False)

    report = check_model(frozen, expression="one_token")
    assert wrong(report) == {r.output for r in report.results} - {"logits", "loss"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("e4m3",)}, "dtype must be one of float32, tf32, float16, bfloat16"),
        ({"dtypes": ("int8",)}, "dtype must be one of"),
        ({"device": "nowhere"}, "device must be one that torch can use"),
        ({"expression": "rotary"}, "expression must select a case of gpt"),
        ({"expression": "training", "dtypes": ("bfloat16",)}, "expression must select a case"),
    ],
)
def test_what_cannot_be_checked_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_model(eager, **options)
    assert "\n" not in str(caught.value)


def test_the_command_checks_a_model(tmp_path):
    name = "gaugeblock.gpt:GPT.from_pretrained"
    arguments = ("-k", "one_token", "--json", tmp_path / "out.json")
    ran = gaugeblock("check", "gpt", name, *arguments, cwd=CHECKOUT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    saved = json.loads((tmp_path / "out.json").read_text())
    assert (saved["op"], saved["candidate"], saved["passed"]) == ("gpt", name, True)
    assert {r["case"] for r in saved["results"]} == {"one_token"}
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from gaugeblock.gpt import GPT\n"
        "def load(directory):\n"
        "    model = GPT.from_pretrained(directory)\n"
        "    model.h[0].ln_1.eps = 0.5\n"
        "    return model\n"
    )
    ran = gaugeblock("check", "gpt", "mine:load", "-k", "one_token", cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "wrong gpt one_token float32 contiguous: logits" in ran.stdout.replace("\n", " ")


def test_a_model_that_ends_its_process_does_not_end_the_check(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, torch\n"
        "from gaugeblock.gpt import GPT\n"
        "class Mine(GPT):\n"
        "    def forward(self, idx, targets=None):\n"
        "        if idx.shape[1] == 1:\n"
        "            os._exit(7)\n"
        "        return super().forward(idx, targets)\n"
    )
    arguments = ("-k", "one_token or narrow_ffn", "--no-backward", "--json", "out.json")
    ran = gaugeblock("check", "gpt", "mine:Mine.from_pretrained", *arguments, cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    kinds = {r["case"]: r["kind"] for r in results}
    assert kinds == {"one_token": "exit", "narrow_ffn": ""}


def test_options_that_a_model_does_not_have_are_refused(tmp_path):
    ran = gaugeblock("check", "gpt", "mine:load", "--layout", "bthd", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.strip() == (
        "gaugeblock: check: layout must be left out for gpt: a model has no such check"
    )
