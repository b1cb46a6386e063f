"""jax.nn.dot_product_attention, differentiated through jax.vjp.

Where JAX's own masks mean the same they are used: `is_causal` and `local_window_size` count from
the first key (top-left), `key_value_seq_lengths` hides keys and moves nothing. `return_lse` is left
out: JAX stops the gradient of its residual.

    python examples/jax_attention.py
    gaugeblock check attention examples.jax_attention:attention --framework jax
"""

import jax
import jax.numpy as jnp


def visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
    """Boolean (B or 1, 1, Tq, Tk): may query i see key j?"""
    i, j = jnp.arange(Tq)[:, None], jnp.arange(Tk)
    n = jnp.array([Tk]) if lengths is None else lengths
    n = n[:, None, None]
    seen = jnp.broadcast_to(j < n, (len(n), Tq, Tk))
    if align == "bottom_right":
        i = i + n - Tq
    if cu_seqlens is not None:
        document = jnp.searchsorted(cu_seqlens, j, side="right") - 1
        seen = seen & (document[:, None] == document)
        j = j - cu_seqlens[document]
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
    Tq, Tk = q.shape[2], k.shape[2]
    lengths = None if lengths is None else jnp.asarray(lengths)
    cu_seqlens = None if cu_seqlens is None else jnp.asarray(cu_seqlens)
    ordered = causal or window is not None
    top_left = align == "top_left" or (Tq == Tk and lengths is None)
    if cu_seqlens is None and not global_tokens and (top_left or not ordered):
        window = None if window is None else (window - 1, 0 if causal else window - 1)
        masks = dict(is_causal=causal, local_window_size=window, key_value_seq_lengths=lengths)
    else:
        masks = dict(
            mask=visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens)
        )
    # JAX holds (B, T, H, D)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, scale=scale, **masks).swapaxes(1, 2)


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check
    from gaugeblock.reference.report import print_report

    report = check(
        "attention", attention, framework="jax", dtypes=("float32", "float16", "bfloat16")
    )
    print_report(report)
    raise SystemExit(not report.passed)
