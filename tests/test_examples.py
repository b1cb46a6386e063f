"""Other people's implementations: the oracle says of them what `examples/peers.py` documents."""

import json
import re
import shlex

import pytest
import torch
from gaugeblock.kernels import eager
from gaugeblock.reference.oracle import check

from examples import peers
from tests.helpers import CHECKOUT, gaugeblock, python

MODULES = {"liger-kernel": "liger_kernel"}
PEERS = {peer.candidate: peer for peer in peers.PEERS}
PAGE = CHECKOUT / "docs" / "oracle.md"

# candidate, dtype, cases that it fails, cases that it passes
CHOSEN = [
    (
        peers.SDPA,
        "float32",
        ("scale_negative", "scale_zero_causal", "lengths"),
        ("causal", "scale_zero", "unseeing_queries", "grouped_heads"),
    ),
    (peers.SDPA, "bfloat16", ("scale_negative", "lengths_causal"), ("causal", "window")),
    (
        peers.EAGER,
        "float32",
        ("unseeing_queries", "lengths"),
        ("scale_negative", "documents", "scores_rise"),
    ),
    (peers.EAGER, "float16", ("scores_rise",), ("causal",)),
    (peers.JAX, "float32", ("unseeing_queries", "lengths"), ("scale_negative",)),
    (
        peers.ONNX,
        "float32",
        ("scale_negative", "lengths"),
        ("causal", "unseeing_queries", "scores_rise"),
    ),
    (peers.ONNX, "bfloat16", ("scores_rise",), ("one_key",)),
    (peers.ONNX_NORM, "float32", (), ("outlier_row", "constant_rows")),
    (peers.ONNX_NORM, "float16", ("outlier_row", "constant_rows"), ("one_column",)),
    ("examples.onnx_reference:gelu", "bfloat16", (), ("erf", "tanh")),
]


def need(peer):
    pytest.importorskip(MODULES.get(peer.package, peer.package))


def ids(chosen):
    return f"{chosen[0].removeprefix('examples.')}-{chosen[1]}"


# NaN and overflow inside NumPy are what is looked for
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("chosen", CHOSEN, ids=ids)
def test_a_peer_fails_what_is_documented_and_nothing_else(chosen):
    candidate, dtype, wrong, right = chosen
    need(PEERS[candidate])
    report = PEERS[candidate].check(dtype, (*wrong, *right))
    assert {r.case for r in report.results} == {*wrong, *right}
    assert {r.case for r in report.failures} == set(wrong)
    for r in report.failures:
        assert peers.explanation(candidate, r, dtype) is not None, r


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    """The record of Liger's kernels, made in a process of its own: they change the interpreter."""
    need(PEERS[peers.LIGER_LOSS])
    path = tmp_path_factory.mktemp("liger") / "peers.json"
    ran = python("-m", "examples.peers", "--only", "liger", "--dtypes", "float32", "--out", path)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text())


def test_liger_fails_what_is_documented_and_nothing_else(liger):
    failed = {e["candidate"]: e["failed"] for e in liger["peers"]}
    assert set(failed) == {name for name in PEERS if "liger" in name}
    for cases in failed.values():
        assert all(f["finding"] is not None for f in cases.values())
    documented = {f.what for f in peers.FINDINGS if "liger" in f.candidate}
    assert {f["what"] for f in liger["findings"]} == documented
    loss = failed[peers.LIGER_LOSS]
    assert loss["all_ignored_mean"]["output"] == "loss"
    assert {f["output"] for f in loss.values() if f["layout"] == "transposed"} == {"dlogits"}


def test_ops_that_the_catalog_lacks_pass(liger):
    unseen = [e for e in liger["peers"] if e["op"].startswith("examples.")]
    assert len(unseen) == 3
    for entry in unseen:
        assert entry["compared"] >= 16
        # rope's backward writes over the gradient it is given, where the heads lie innermost
        assert {f["kind"] for f in entry["failed"].values()} <= {"damage"}
        assert not entry["failed"] or entry["candidate"] == peers.LIGER_ROPE


@pytest.mark.parametrize("name", ["liger_rms_norm", "liger_rope", "liger_swiglu"])
def test_an_unseen_op_takes_thirty_lines(name):
    lines = (CHECKOUT / "examples" / f"{name}.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 30


def test_a_documented_command_shows_the_defect():
    finding = peers.FINDINGS[0]
    command = shlex.split(PEERS[finding.candidate].command(finding.dtypes[0], finding.cases))
    ran = gaugeblock(*command[1:], "--no-shrink")
    assert ran.returncode == 1, ran.stderr
    for case in finding.cases:
        assert f"wrong attention {case} float32" in ran.stdout


def test_the_record_is_that_of_these_peers():
    record = json.loads((CHECKOUT / "docs" / "oracle" / "peers.json").read_text())
    assert record["unavailable"] == []
    measured = {(e["candidate"], e["dtype"]) for e in record["peers"]}
    assert measured == {(p.candidate, dtype) for p in peers.PEERS for dtype in p.dtypes}
    for entry in record["peers"]:
        assert all(f["finding"] is not None for f in entry["failed"].values()), entry["candidate"]
    assert [f["what"] for f in record["findings"]] == [f.what for f in peers.FINDINGS]
    for finding in record["findings"]:
        assert finding["command"] in PAGE.read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_pages_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = blocks("python")
    assert len(sources) == 4
    for source in sources:
        # the reader's own functions and device
        given = {"my_layer_norm": eager.layer_norm, "my_swiglu": swiglu}
        exec(source.replace('"cuda"', '"cpu"'), given)
        if "attention" in given:
            report = check("attention", given["attention"], expression="causal or top_left")
            assert {r.case for r in report.results} > {"top_left"}
            # where torch's mask means something else
            assert {r.kind for r in report.failures} == {"exception", "nonfinite"}


def swiglu(a, b):
    return (torch.sigmoid(a.float()) * a).to(a.dtype) * b
