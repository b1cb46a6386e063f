"""Answers that do not come from computing the op, or not every time."""

import torch

from . import models
from .mutants import mutant

_DIFFERENTIABLE = (
    "attention", "layer_norm", "residual_layer_norm", "ffn", "cross_entropy",
    "linear_cross_entropy", "embedding", "dropout",
)  # fmt: skip
_FORWARD = ("paged_attention", "adamw", "sample")
_MODELS = {op: getattr(models, op) for op in (*_DIFFERENTIABLE, *_FORWARD)}


def right(op, *inputs, **options):
    """The right answer, a tuple."""
    outputs = _MODELS[op](*inputs, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def form(outputs):
    """One tensor, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else outputs


def cheat(*ops, **about):
    """Register a class of cheats for several ops; the class is called with the op's name."""

    def register(base):
        for op in ops:
            named = type(base.__name__, (base,), {"op": op})
            mutant(op, cheat=True, **about)(named)
        return base

    return register


class Cheat:
    op = ""

    def __call__(self, *inputs, **options):
        return form(self.outputs(right(self.op, *inputs, **options), inputs, options))


@cheat(*_DIFFERENTIABLE, *_FORWARD, bug="zeros", seen="any case")
class Zeros(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(map(torch.zeros_like, outputs))


@cheat(*_DIFFERENTIABLE, *_FORWARD, bug="constants", seen="any case")
class Ones(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(map(torch.ones_like, outputs))


@cheat("attention", "layer_norm", "ffn", "cross_entropy", bug="constants", seen="any case")
class MeanOfTheAnswer(Cheat):
    """The mean of the right answer everywhere: right on average."""

    def outputs(self, outputs, inputs, options):
        return tuple(torch.full_like(y, float(y.detach()[y.isfinite()].mean())) for y in outputs)


@cheat("layer_norm", "ffn", "dropout", bug="the input returned", seen="any case")
class InputReturned(Cheat):
    def outputs(self, outputs, inputs, options):
        return (inputs[0].clone(),)


@cheat("attention", bug="the input returned", seen="any case")
class QueriesReturned(Cheat):
    def outputs(self, outputs, inputs, options):
        return (inputs[0].clone(), *outputs[1:])


@cheat("attention", bug="mean of the values for every query", seen="any case")
class MeanOfValues(Cheat):
    def outputs(self, outputs, inputs, options):
        q, _, v = inputs
        mean = v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], 1)
        return (mean.expand_as(q).clone(), *outputs[1:])


@cheat("adamw", bug="the input returned", seen="any case")
class NoStep(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(x.clone() for x in (inputs[0], *inputs[2:4]))


@cheat("layer_norm", "attention", "adamw", bug="NaN everywhere", seen="any case")
class Nans(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(torch.full_like(y, torch.nan) for y in outputs)


@cheat(
    "layer_norm", "attention", "cross_entropy", "paged_attention", "adamw",
    bug="the output of the previous call", seen="new content in a shape seen before",
)  # fmt: skip
class PreviousOutput(Cheat):
    """The first call of a shape is right, every other gets what the one before should have."""

    def __init__(self):
        self.previous = {}

    def outputs(self, outputs, inputs, options):
        key = tuple((y.shape, y.dtype) for y in outputs)
        answer = self.previous.get(key, outputs)
        self.previous[key] = outputs
        return answer


@cheat(
    "layer_norm", "ffn", "attention", "sample",
    bug="right only on the first call", seen="a second call",
)  # fmt: skip
class RightOnce(Cheat):
    def __init__(self):
        self.called = False

    def outputs(self, outputs, inputs, options):
        first, self.called = not self.called, True
        return outputs if first else tuple(map(torch.zeros_like, outputs))


@cheat(
    "layer_norm", "attention", "ffn",
    bug="right only on the first call", seen="a third call with new content",
)  # fmt: skip
class RightAtEachFirstShape(Cheat):
    """The first answer for a shape, given again from then on."""

    def __init__(self):
        self.answers = {}

    def outputs(self, outputs, inputs, options):
        key = tuple(x.shape for x in inputs)
        return self.answers.setdefault(key, outputs)


@cheat(
    "attention", "layer_norm", "ffn",
    bug="right only for the benchmark's shape", seen="any other shape",
)  # fmt: skip
class RightAtTheBenchmark(Cheat):
    """Right where the last dimension is that of GPT-2."""

    def outputs(self, outputs, inputs, options):
        if inputs[0].shape[-1] in (64, 768, 1600):
            return outputs
        return tuple(map(torch.zeros_like, outputs))


@cheat("layer_norm", "ffn", bug="last column of an odd row left at 0", seen="an odd size")
class RightAtEvenSizes(Cheat):
    def outputs(self, outputs, inputs, options):
        (y,) = outputs
        columns = torch.arange(y.shape[-1])
        return (torch.where(columns < max(y.shape[-1] // 2 * 2, 1), y, 0),)


class _Instead(torch.autograd.Function):
    """Other values with the gradient of the right ones."""

    @staticmethod
    def forward(ctx, y, other):
        return other.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@cheat(
    "layer_norm", "attention", "adamw",
    bug="stale memory of an earlier answer", seen="new content in a shape seen before",
)  # fmt: skip
class StaleMemory(Cheat):
    """A buffer for each shape, filled by the first call and never written again. Gradients are
    right.
    """

    def __init__(self):
        self.buffers = {}

    def outputs(self, outputs, inputs, options):
        return tuple(
            _Instead.apply(y, self.buffers.setdefault((i, y.shape), y.detach().clone()))
            for i, y in enumerate(outputs)
        )


@cheat(
    "layer_norm", "attention", "ffn",
    bug="uninitialised memory that often holds the right answer", seen="fresh memory set to NaN",
)  # fmt: skip
class FreshMemory(Cheat):
    """Memory that the allocator hands out again, where the caller's own reference just was."""

    def outputs(self, outputs, inputs, options):
        poisoned = (torch.empty(y.shape).isnan() for y in outputs)
        return tuple(torch.where(p, torch.nan, y).to(y.dtype) for p, y in zip(poisoned, outputs))


@cheat(
    "layer_norm", "attention", "ffn", "cross_entropy", "adamw", "paged_attention",
    bug="result cached by pointer", seen="new content at the same addresses",
)  # fmt: skip
class CachedByPointer(Cheat):
    def __init__(self):
        self.cache = {}

    def outputs(self, outputs, inputs, options):
        key = tuple((x.data_ptr(), x.shape) for x in inputs if x is not None)
        return self.cache.setdefault(key, outputs)


@cheat(
    "layer_norm", "attention",
    bug="result cached by pointer", seen="new content at the same address of one argument",
)  # fmt: skip
class CachedByFirstPointer(Cheat):
    def __init__(self):
        self.cache = {}

    def outputs(self, outputs, inputs, options):
        key = inputs[0].data_ptr(), outputs[0].shape
        return self.cache.setdefault(key, outputs)


@cheat(
    "layer_norm", "attention", "ffn", "residual_layer_norm",
    bug="no gradient path", seen="any backward",
)  # fmt: skip
class Detached(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(y.detach() for y in outputs)


@cheat(
    "attention", "layer_norm", bug="only the first and last rows right", seen="rows between them"
)
class EndsOfTheTensor(Cheat):
    def outputs(self, outputs, inputs, options):
        return tuple(self.ends(y) for y in outputs)

    @staticmethod
    def ends(y):
        y = y.clone()
        y[..., 1:-1, :] = 0
        return y


@cheat("ffn", "layer_norm", bug="right answer with noise", seen="any case")
class Noise(Cheat):
    """Off by a hundredth: within the tolerances that tests are often given."""

    def outputs(self, outputs, inputs, options):
        return tuple(y * (1 + 0.02 * (torch.rand_like(y.float()) - 0.5)).to(y) for y in outputs)
