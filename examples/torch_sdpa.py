"""torch's scaled_dot_product_attention, held against the oracle's `attention`.

An adapter takes the op's public signature and says what the candidate says, right or wrong: nothing
is repaired here. What SDPA cannot answer is left out of the signature, and reported as not checked:
`return_lse`, and `dropout`, whose mask is torch's own.

    python examples/torch_sdpa.py
    gaugeblock check attention examples.torch_sdpa:attention --dtype float16
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
    """Boolean (B or 1, 1, Tq, Tk): may query i see key j?"""
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
    n = torch.tensor([Tk]) if lengths is None else lengths
    seen = (j < n[:, None]).expand(Tq, -1, -1).transpose(0, 1)  # (B or 1, Tq, Tk)
    if align == "bottom_right":
        i = i + n[:, None, None] - Tq
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        document = torch.searchsorted(starts, j, right=True) - 1
        seen = seen & (document[:, None] == document)
        j = j - starts[document]
        i = j[:, None]
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        near = j > i - window if causal else (j - i).abs() < window
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
    (_, H, Tq, _), (_, Hkv, Tk, _) = q.shape, k.shape
    # SDPA's own causal mask is top-left
    own = window is None and lengths is None and cu_seqlens is None
    own = own and (not causal or align == "top_left" or Tq == Tk)
    mask = (causal, align, window, global_tokens, lengths, cu_seqlens)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if own else visible(Tq, Tk, *mask).to(q.device),
        is_causal=causal and own,
        scale=scale,
        enable_gqa=Hkv != H,
    )


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check
    from gaugeblock.reference.report import print_report

    report = check("attention", attention, dtypes=("float32", "float16", "bfloat16"))
    print_report(report)
    raise SystemExit(not report.passed)
