"""How a candidate of each framework is called: NumPy arrays in, answers and gradients out.

An adapter's `run(fn, inputs, options, dys, layout)` returns two lists of `Answer`: the outputs, and
the gradients of the floating inputs (empty where `dys` is None). Frameworks are imported when used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LAYOUTS = ("contiguous", "transposed", "sliced", "broadcast_grad")


@dataclass(frozen=True)
class Answer:
    """What a candidate returned: float64 values and the name of the dtype they came in."""

    values: np.ndarray
    dtype: str


class WrongForm(Exception):
    """A candidate's answer is no tensor, or too few of them."""


class NumpyAdapter:
    """NumPy functions; gradients through `backward(do, *inputs, **options)`."""

    def __init__(self, backward=None):
        self.backward = backward

    def run(self, fn, inputs, options, dys, layout="contiguous"):
        arrays = [_laid_out(x, layout, np) for x in inputs.values()]
        outputs = _as_tuple(fn(*arrays, **options), np.ndarray | np.generic)
        if dys is None:
            return list(map(self._answer, outputs)), []
        grads = self.backward(dys if len(dys) > 1 else dys[0], *arrays, **options)
        return list(map(self._answer, outputs)), list(map(self._answer, grads))

    @staticmethod
    def _answer(x):
        return Answer(np.array(x, dtype=np.float64), np.asarray(x).dtype.name)


class TorchAdapter:
    """Torch functions, differentiated through autograd unless `backward` is given."""

    def __init__(self, device="cpu", backward=None):
        import torch

        self.torch = torch
        try:
            self.device = torch.device(device)
            # a device that is absent, or holds no values, shows here
            torch.zeros(1, device=self.device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError, TypeError):
            raise ValueError(
                f"check: device must be one that torch can use here, got {device!r}; use cpu"
            ) from None
        self.backward = backward

    def run(self, fn, inputs, options, dys, layout="contiguous"):
        torch = self.torch
        tensors = [_laid_out(self._tensor(x), layout, torch) for x in inputs.values()]
        floating = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        differentiate = dys is not None and self.backward is None
        with torch.set_grad_enabled(differentiate):
            outputs = _as_tuple(fn(*tensors, **options), torch.Tensor)
        answers = list(map(self._answer, outputs))
        if dys is None:
            return answers, []
        seeds = [self._seed(dy, y, layout) for dy, y in zip(dys, outputs)]
        if not differentiate:
            with torch.no_grad():
                grads = self.backward(seeds if len(seeds) > 1 else seeds[0], *tensors, **options)
        else:
            paths = [(y, dy) for y, dy in zip(outputs, seeds) if y.requires_grad]
            grads = [None] * len(floating)
            if paths:
                ys, seeds = zip(*paths)
                grads = torch.autograd.grad(ys, floating, seeds, allow_unused=True)
        # an output without a gradient path counts as zero gradients
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, floating)]
        return answers, list(map(self._answer, grads))

    def _tensor(self, x):
        torch = self.torch
        if x.dtype.name == "bfloat16":
            x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        else:
            x = torch.from_numpy(x)
        return x.to(self.device)

    def _seed(self, dy, y, layout):
        seed = self.torch.from_numpy(np.array(dy)).to(device=y.device, dtype=y.dtype)
        return seed.flatten()[0].expand(y.shape) if layout == "broadcast_grad" else seed

    def _answer(self, t):
        name = str(t.dtype).removeprefix("torch.")
        return Answer(t.detach().double().cpu().numpy(), name)


def _as_tuple(result, kind):
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    for output in outputs:
        if not isinstance(output, kind):
            raise WrongForm(f"must return tensors, returned {type(output).__name__}")
    return outputs


def _laid_out(x, layout, xp):
    """A copy of the same values with other strides. `xp` is numpy or torch."""
    if layout == "transposed" and x.ndim > 1:
        # heads innermost for (B, H, T, D), columns innermost for matrices
        a, b = (1, 2) if x.ndim > 2 else (0, 1)
        return xp.swapaxes(xp.asarray(_copy(xp.swapaxes(x, a, b))), a, b)
    if layout == "sliced" and x.ndim:
        wide = _copy(xp.stack([x, x, x], -1).reshape(*x.shape[:-1], -1))
        wide[..., : x.shape[-1]] = x
        wide = wide[..., : x.shape[-1]]
        return wide
    return _copy(x)


def _copy(x):
    return x.copy() if isinstance(x, np.ndarray) else x.contiguous().clone()
