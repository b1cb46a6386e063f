"""How long the reference takes beside torch, both in float64 on this machine's CPU.

    python -m gaugeblock.benchmarks.reference_speed [--out FILE] [--preset gpt2] [--tokens 256]

GPT-2 on one row of tokens, weights random and shared by both: the forward to the logits, and the
backward from a gradient of the logits to those of all weights. The peer is GPT-2 as a torch user
would write it, with torch's own attention, GELU, norm and products. Logits and gradients must agree
before anything is timed. The two take turns, --rounds times several evaluations in a row, and the
ratios are those of the medians. The first evaluation of a turn is counted apart: its memory has
lain idle, and a virtual machine may have to get it back from its host. NumPy asks for huge pages,
which then come slowly; NUMPY_MADVISE_HUGEPAGE=0 in the environment turns that off. Threads are what
OMP_NUM_THREADS says, all cores where it says nothing.
"""

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gaugeblock.gpt.config import GPTConfig

from gaugeblock import reference


class Torch:
    """GPT-2 on the reference's own weights."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = {k: torch.from_numpy(w).requires_grad_() for k, w in weights.items()}

    def forward(self, ids):
        """-> logits, and what its backward needs: the same."""
        w, (_, T) = self.weights, ids.shape
        h = w["wte.weight"][torch.from_numpy(ids)] + w["wpe.weight"][:T]
        for i in range(self.config.n_layer):
            h = h + self._attend(f"h.{i}.attn", self._norm(f"h.{i}.ln_1", h))
            x = self._affine(f"h.{i}.mlp.c_fc", self._norm(f"h.{i}.ln_2", h))
            h = h + self._affine(f"h.{i}.mlp.c_proj", F.gelu(x, approximate="tanh"))
        logits = F.linear(self._norm("ln_f", h), w["wte.weight"])
        return logits, logits

    def backward(self, dlogits, logits):
        weights = list(self.weights.values())
        gradients = torch.autograd.grad(logits, weights, torch.from_numpy(dlogits))
        return dict(zip(self.weights, gradients))

    def _norm(self, key, x):
        w, b = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
        return F.layer_norm(x, x.shape[-1:], w, b, self.config.eps)

    def _affine(self, key, x):
        rows = torch.addmm(
            self.weights[f"{key}.bias"], x.flatten(0, -2), self.weights[f"{key}.weight"]
        )
        return rows.view(*x.shape[:-1], -1)

    def _attend(self, key, x):
        B, T, C = x.shape
        qkv = self._affine(f"{key}.c_attn", x).view(B, T, 3, self.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._affine(f"{key}.c_proj", o.transpose(1, 2).reshape(B, T, C))


# evaluations in a row
_IN_A_ROW = 4


def measure(config, tokens, rounds):
    """{"reference" or "torch": {"fwd" or "bwd": seconds}}, of first evaluations, of others."""
    rng = np.random.default_rng(0)
    weights = {
        key: 0.02 * rng.standard_normal(shape) + (".ln_" in f".{key}" and key.endswith("weight"))
        for key, shape in reference.parameter_shapes(config).items()
    }
    ids = rng.integers(0, config.vocab_size, (1, tokens))
    dlogits = rng.standard_normal((1, tokens, config.vocab_size)) / tokens
    models = {"reference": reference.GPT(config, weights), "torch": Torch(config, weights)}
    _expect_parity(models, ids, dlogits)
    first, others = ({name: {"fwd": [], "bwd": []} for name in models} for _ in range(2))
    for _ in range(rounds):
        for name, model in models.items():
            for i in range(_IN_A_ROW):
                for direction, seconds in zip(("fwd", "bwd"), _evaluation(model, ids, dlogits)):
                    (others if i else first)[name][direction].append(seconds)
    return first, others


def _evaluation(model, ids, dlogits):
    """Seconds of a forward and of its backward."""
    start = time.perf_counter()
    _, cache = model.forward(ids)
    middle = time.perf_counter()
    gradients = model.backward(dlogits, cache)
    end = time.perf_counter()
    del gradients
    return middle - start, end - middle


def _expect_parity(models, ids, dlogits):
    """Also the evaluation of each that is not timed."""
    answers = []
    for model in models.values():
        logits, cache = model.forward(ids)
        answers.append({"logits": logits, **model.backward(dlogits, cache)})
    for key, ours in answers[0].items():
        theirs = answers[1][key].detach().numpy()
        error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
        if not error <= 1e-10 * scale:
            raise ValueError(f"reference_speed: {key} must agree with torch, is {error} off")


def record(config, tokens, rounds):
    """What is written: the machine, every time, and the ratio of the medians."""
    first, others = measure(config, tokens, rounds)
    return {
        "shape": {"n_layer": config.n_layer, "n_embd": config.n_embd, "tokens": tokens},
        "parameters": reference.parameter_count(config),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        # NumPy asks for huge pages, which some machines are slow to find
        "NUMPY_MADVISE_HUGEPAGE": os.environ.get("NUMPY_MADVISE_HUGEPAGE"),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "first": _summary(first),
        "others": _summary(others),
    }


def _summary(times):
    medians = {
        name: {direction: statistics.median(seconds) for direction, seconds in of.items()}
        for name, of in times.items()
    }
    ratios = {d: medians["reference"][d] / medians["torch"][d] for d in ("fwd", "bwd")}
    return {"times_s": times, "median_s": medians, "ratio": ratios}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the record, as JSON")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--width", type=int, help="another width than the preset's")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    given = parser.parse_args(arguments)
    config = GPTConfig.preset(given.preset)
    config = replace(
        config, n_layer=given.layers or config.n_layer, n_embd=given.width or config.n_embd
    )
    found = record(config, given.tokens, given.rounds)
    for which in ("others", "first"):
        for direction, ratio in found[which]["ratio"].items():
            of = found[which]["median_s"]
            print(
                f"{direction}{', first' if which == 'first' else ''}: "
                f"reference {of['reference'][direction]:.3f} s, "
                f"torch {of['torch'][direction]:.3f} s, ratio {ratio:.2f}"
            )
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
