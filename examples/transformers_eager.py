"""transformers' eager attention of GPT-2, under the masks that transformers builds for it.

The mask is added to the scores: 0, or the dtype's lowest finite value, as `eager_mask` makes it.

    python examples/transformers_eager.py
    gaugeblock check attention examples.transformers_eager:attention
"""

from types import SimpleNamespace

import torch
from transformers.masking_utils import eager_mask
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.models.llama.modeling_llama import repeat_kv

EVALUATION = SimpleNamespace(training=False)


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
    (B, H, Tq, _), (_, Hkv, Tk, _) = q.shape, k.shape
    n = torch.full((B,), Tk) if lengths is None else lengths.long()
    starts = torch.zeros(1).long() if cu_seqlens is None else cu_seqlens.long()

    def visible(b, h, i, j):
        """A mask function of transformers: index tensors that broadcast -> bool."""
        seen = j < n[b]
        document = torch.searchsorted(starts, i, right=True) - 1
        other = torch.searchsorted(starts, j, right=True) - 1
        if align == "bottom_right":
            i = i + n[b] - Tq
        if cu_seqlens is not None:
            seen = seen & (document == other)
            i, j = i - starts[document], j - starts[other]
        if causal:
            seen = seen & (j <= i)
        if window is not None:
            near = (j > i - window) & (causal | (j < i + window))
            seen = seen & (near | (j < global_tokens))
        return seen

    masked = causal or window is not None or lengths is not None or cu_seqlens is not None
    mask = eager_mask(B, Tq, Tk, mask_function=visible, dtype=q.dtype) if masked else None
    # GPT-2 has no grouped heads: its function is given what Llama's would make of them
    k, v = repeat_kv(k, H // Hkv), repeat_kv(v, H // Hkv)
    o, _ = eager_attention_forward(EVALUATION, q, k, v, mask, scaling=scale)
    return o.transpose(1, 2)


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check
    from gaugeblock.reference.report import print_report

    report = check("attention", attention, dtypes=("float32", "float16", "bfloat16"))
    print_report(report)
    raise SystemExit(not report.passed)
