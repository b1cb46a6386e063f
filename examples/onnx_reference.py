"""ONNX's reference evaluator on one-node models: Attention, LayerNormalization and Gelu.

Attention-25 masks natively what it can say: `nonpad_kv_seqlen` aligns bottom-right, its absence
top-left, and windows count from there; documents and global tokens go in as `attn_mask`. Gelu is
an op that the catalog does not hold. The evaluator has no gradients.

    python examples/onnx_reference.py
    gaugeblock check attention examples.onnx_reference:attention --framework numpy --no-backward
"""

from functools import cache

import numpy as np
from gaugeblock.reference.oracle import Case, Op
from onnx import helper
from onnx.reference import ReferenceEvaluator
from scipy.special import erf

_OPSET = helper.make_opsetid("", 25)


@cache
def _model(op, names, dtypes, **attributes):
    """An evaluator of one node; the names of absent optional inputs are empty."""
    types = [helper.np_dtype_to_tensor_dtype(dtype) for dtype in dtypes]
    given = [name for name in names if name]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)],
        op,
        [helper.make_tensor_value_info(*pair, None) for pair in zip(given, types)],
        [helper.make_tensor_value_info("y", types[0], None)],
    )
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[_OPSET]))


def run(op, inputs, **attributes):
    """The node's answer; inputs {name: array or None}, in the order of its schema."""
    names = tuple(name if x is not None else "" for name, x in inputs.items())
    given = {name: x for name, x in inputs.items() if x is not None}
    return _model(op, names, tuple(x.dtype for x in given.values()), **attributes).run(None, given)[
        0
    ]


def visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
    """Boolean (B or 1, 1, Tq, Tk): may query i see key j?"""
    i, j = np.arange(Tq)[:, None], np.arange(Tk)
    n = np.array([Tk]) if lengths is None else np.asarray(lengths)
    n = n[:, None, None]
    seen = np.repeat(j < n, Tq, axis=1)
    if align == "bottom_right":
        i = i + n - Tq
    if cu_seqlens is not None:
        starts = np.asarray(cu_seqlens)
        document = np.searchsorted(starts, j, side="right") - 1
        seen = seen & (document[:, None] == document)
        j = j - starts[document]
        i = j[:, None]
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        near = (j > i - window) & (causal | (j < i + window))
        seen = seen & (near | (j < global_tokens))
    return seen[:, None]


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    align="bottom_right",
    window=None,
    global_tokens=0,
    lengths=None,
    cu_seqlens=None,
    scale=None,
):
    B, Tq, Tk = len(q), q.shape[2], k.shape[2]
    inputs = dict(q=q, k=k, v=v, mask=None, past_key=None, past_value=None, length=None)
    attributes = {} if scale is None else {"scale": float(scale)}
    top_left = align == "top_left"
    if cu_seqlens is not None or global_tokens or (top_left and lengths is not None):
        inputs["mask"] = visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens)
    else:
        attributes["is_causal"] = int(causal)
        if window is not None:
            attributes["left_window_size"] = window - 1
            attributes["right_window_size"] = -1 if causal else window - 1
        if not top_left:
            length = np.full(B, Tk) if lengths is None else lengths
            inputs["length"] = np.asarray(length, np.int64)
    return run("Attention", inputs, **attributes)


def layer_norm(x, w, b, eps=1e-5):
    return run("LayerNormalization", dict(x=x, w=w, b=b), axis=-1, epsilon=eps)


def gelu(x, approximate="none"):
    return run("Gelu", dict(x=x), approximate=approximate)


def gelu_formula(x, approximate="none"):
    """x·Φ(x), or its tanh approximation."""
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x * np.sqrt(0.5)))


GELU = Op(
    "gelu",
    gelu_formula,
    {"x": "M N"},
    [Case("erf", M=7, N=33), Case("tanh", M=7, N=33, approximate="tanh")],
    outputs={"y": "M N"},
)


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check
    from gaugeblock.reference.report import print_report

    passed = True
    for op, fn in (("attention", attention), ("layer_norm", layer_norm), (GELU, gelu)):
        report = check(
            op, fn, framework="numpy", backward=False, dtypes=("float32", "float16", "bfloat16")
        )
        print_report(report)
        passed &= report.passed
    raise SystemExit(not passed)
