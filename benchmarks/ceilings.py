"""What this chip reaches, measured as everything else is: copies, matrix products, exponentials.

copy      bytes read + bytes written of a copy, at several sizes, the cache flushed before
matrix    2 n³ / time of a square product of random normal values
exp       exponentials a second of values that lie in registers (a CPU's in its first cache)
"""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl

from .timing import clock, interleave

_COPIES = {
    "cuda": [1 << n for n in (20, 22, 24, 25, 26, 27, 28, 30, 32)],
    "cpu": [1 << n for n in (18, 22, 24, 26)],
}
_PRODUCT = {"cuda": 8192, "cpu": 768}
_DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32",)}
# exponentials of a program of the kernel, one after the other in each lane
_EXP_ROUNDS, _EXP_LANES, _EXP_PROGRAMS = 4096, 1024, 132 * 16
_EXP_CPU = 4096


@triton.jit
def _exp_kernel(y_ptr, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    offs = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x = -1.0 / (1.0 + offs.to(tl.float32))
    for _ in range(ROUNDS):
        # it comes to stay at −1: a normal number, whose exp costs what any costs
        x = tl.exp2(x) - 1.5
    tl.store(y_ptr + offs, x)


def measure(device, budget_s=20.0, seed=0):
    """{"copy_gb_s": {bytes: rate}, "matrix_tflop_s": {dtype: rate}, "exp_t_s": rate}."""
    timer, rng = clock(device), np.random.default_rng(seed)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf
    sizes = [n for n in _COPIES[device] if 2 * n < free]
    share = budget_s / 3
    found = {"copy_gb_s": {}, "matrix_tflop_s": {}}
    for n in sizes:
        source, target = (torch.empty(n // 2 // 4, device=device).normal_() for _ in range(2))
        ms = _median(timer, target.copy_, source, budget_s=share / len(sizes), rng=rng)
        found["copy_gb_s"][str(n)] = n / ms / 1e6
    for dtype in _DTYPES[device]:
        n = _PRODUCT[device] // (2 if device == "cuda" and dtype == "float32" else 1)
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        ms = _median(timer, torch.mm, a, b, budget_s=share / len(_DTYPES[device]), rng=rng)
        found["matrix_tflop_s"][dtype] = 2 * n**3 / ms / 1e9
    call, count = _exponentials(device)
    found["exp_t_s"] = count / _median(timer, call, budget_s=share, rng=rng) / 1e9
    return found


def save(found, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _median(timer, call, *arguments, budget_s, rng):
    calls = {"": lambda number: call(*arguments)}
    samples = interleave(timer, calls, budget_s, rng)[""]
    if samples.error:
        raise samples.error
    return samples.median


def _exponentials(device):
    """(a call, how many exponentials it takes)."""
    if device == "cpu":
        x = torch.randn(_EXP_CPU)
        return partial(_in_cache, x, torch.empty_like(x)), 100 * _EXP_CPU
    y = torch.empty(_EXP_PROGRAMS * _EXP_LANES, device=device)
    launch = _exp_kernel[(_EXP_PROGRAMS,)]
    return partial(launch, y, _EXP_ROUNDS, _EXP_LANES), y.numel() * _EXP_ROUNDS


def _in_cache(x, y):
    for _ in range(100):
        torch.exp(x, out=y)
