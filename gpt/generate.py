"""Sampling from a GPT, with a key/value cache that changes nothing but the time it takes."""

from __future__ import annotations

import torch

from gaugeblock import kernels

from .model import KVCache


@torch.no_grad()
def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    *,
    seed=None,
    use_cache=True,
    slide=False,
):
    """The prompt (B, T) and `max_new_tokens` sampled tokens: (B, T + max_new_tokens).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p the likeliest ones whose
    probabilities first reach p. `seed` makes the draw repeatable.
    slide: past block_size tokens, go on from the last half of the context instead of raising;
    with or without a cache the contexts are the same.
    Nothing is dropped, in training mode neither.
    Raises ValueError for options out of range, or too many tokens for block_size.
    """
    _expect_options(max_new_tokens, temperature, top_k, top_p)
    if idx.ndim != 2:
        raise ValueError(f"generate: idx must have shape (B, T), got {tuple(idx.shape)}")
    block_size, T = model.config.block_size, idx.shape[1]
    if not slide and T + max_new_tokens > block_size:
        raise ValueError(
            f"generate: prompt and new tokens must fit block_size = {block_size}, "
            f"got {T} + {max_new_tokens}; ask for fewer, or pass slide=True"
        )
    draw = None
    if seed is not None:
        draw = torch.Generator(device=idx.device).manual_seed(seed)
    cache, start, training = None, max(0, T - block_size), model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if idx.shape[1] - start > block_size:
                start, cache = idx.shape[1] - block_size // 2 - 1, None
            if cache is None and use_cache:
                cache = KVCache(model, idx.shape[0])
            new = idx[:, start + (cache.length if use_cache else 0) :]
            logits, _ = model(new, cache=cache)
            token = sample(logits[:, -1], temperature, top_k, top_p, draw, model.impl)
            idx = torch.cat([idx, token[:, None].to(idx.dtype)], dim=1)
    finally:
        model.train(training)
    return idx


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, impl="auto"):
    """One token for each row of logits (B, V), from the generator's uniform numbers."""
    u = torch.zeros(len(logits), device=logits.device)
    if temperature:
        u.uniform_(generator=generator)
    return kernels.sample(logits, u, temperature, top_k, top_p, impl=impl)


def _expect_options(max_new_tokens, temperature, top_k, top_p):
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be ≥ 0, got {max_new_tokens}")
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:
        raise ValueError(
            f"generate: temperature must be 0 or lie in 0.001 … 1000, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be ≥ 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must lie in 0 … 1, got {top_p}")
