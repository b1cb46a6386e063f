"""A provider on a case, ready to be timed: inputs on the device, a call for each set of them."""

from __future__ import annotations

import contextlib
import secrets

import numpy as np
import torch
from gaugeblock.reference.oracle.adapters import as_torch

# input sets that calls go through turn about: none is in a cache, and an answer that is kept from
# another call is a wrong one
SETS = 3
# a tensor set apart begins at one of so many places, these bytes from each other
_PLACES = 1 << 16
_PLACE_BYTES = 64


def apart(x):
    """A contiguous copy of a tensor at an address that no tensor before it can be expected to have.

    An allocator gives out again what was freed, so a new tensor may lie where an old one lay, and a
    function that keeps answers by address would know it.
    """
    step = _PLACE_BYTES // x.element_size()
    room = torch.empty(x.numel() + _PLACES * step, dtype=x.dtype, device=x.device)
    start = secrets.randbelow(_PLACES) * step
    return room[start : start + x.numel()].view(x.shape).copy_(x)


class InputSets:
    """`SETS` times the inputs of a case, each at addresses of its own.

    The first holds the content that parity is checked with; the others that content with floating
    values halved again and again, which no op's results survive unchanged.
    """

    def __init__(self, expectation, device):
        op, content = expectation.op, expectation.content()
        self.op, self.device = op, device
        self.differentiable = op.differentiable(content.inputs)
        self.names = list(content.inputs)
        self.kept = [
            None if x is None else as_torch(torch, x).to(device) for x in content.inputs.values()
        ]
        storage = getattr(torch, expectation.storage.name)
        self.dys = [as_torch(torch, np.array(dy)).to(device, storage) for dy in content.dys or ()]
        self.sets = [self._copies(0.5**i, torch.clone) for i in range(SETS)]
        lists = {k: v for k, v in expectation.options.items() if isinstance(v, (tuple, list))}
        self.options = expectation.options | {
            k: torch.tensor(v, dtype=torch.int32, device=device) for k, v in lists.items()
        }

    def fresh(self, factor=1.0):
        """The first content, floating values times a factor, where no call has seen any."""
        return self._copies(factor, apart)

    def _copies(self, factor, copy):
        copies = []
        for name, x in zip(self.names, self.kept):
            if x is not None:
                x = copy(x * factor if x.is_floating_point() else x)
                x.requires_grad_(name in self.differentiable)
            copies.append(x)
        return copies

    def restore(self, factor=1.0):
        """The first content at the first addresses again, times a power of two."""
        for mine, kept in zip(self.sets[0], self.kept):
            if mine is not None:
                # past autograd, which would refuse the backward of what it thinks has changed
                mine.data.copy_(kept * factor if mine.is_floating_point() else kept)

    def changed(self):
        """The names of inputs of the first set that no longer hold what they held."""
        updated = set(self.op.updates.values())
        return [
            name
            for name, mine, kept in zip(self.names, self.sets[0], self.kept)
            if mine is not None
            and name not in updated
            and not torch.equal(_bits(mine), _bits(kept))
        ]


class Contender:
    """A provider's function on a case in one direction.

    run(number) does the call of a round on that round's input set and returns the outputs or the
    gradients. On a GPU a call is the replay of a captured graph, where the function can be
    captured (`graph`).
    """

    def __init__(self, name, fn, sets, direction):
        self.name, self.sets, self.direction = name, sets, direction
        self.fn = sets.op.called(fn)
        self.graphs, self.results = [], []
        self.graph = False
        if sets.device == "cpu":
            self.calls = [self.eager(tensors) for tensors in sets.sets]
            return
        # a backward runs on the stream of its forward, which must be the one that is captured
        self.stream = torch.cuda.Stream()
        with self._aside():
            self.calls = [self.eager(tensors) for tensors in sets.sets]
        self._capture()

    def eager(self, tensors, factor=1.0):
        """A call on these tensors, without a graph; a backward's output gradients times factor.

        With a factor they lie where no call has seen any.
        """
        # no closure holds this object, or its memory would wait for the collector
        fn, sets, options = self.fn, self.sets, self.sets.options
        if self.direction == "fwd":

            def forward():
                with torch.no_grad():
                    return _outputs(fn(*tensors, **options), tensors, sets)

            return forward
        leaves = [t for n, t in zip(sets.names, tensors) if n in sets.differentiable]
        outputs = [
            (y, dy)
            for y, dy in zip(_outputs(fn(*tensors, **options), tensors, sets), sets.dys)
            if y.requires_grad
        ]
        ys = [y for y, _ in outputs]
        copy = torch.clone if factor == 1.0 else apart
        dys = [copy(dy.to(y.dtype) * factor) for y, dy in outputs]

        def backward():
            grads = torch.autograd.grad(ys, leaves, dys, retain_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))

        backward.dys = dys
        return backward

    def scale(self, factor):
        """A backward's output gradients of the first set, at their addresses, times a factor."""
        for dy in self.calls[0].dys:
            dy.mul_(factor)

    def run(self, number):
        i = number % len(self.calls)
        if not self.graph:
            return self.calls[i]()
        self.graphs[i].replay()
        return self.results[i]

    def poison(self):
        """NaN into what the graph of the first set writes: it must write all of it again."""
        if not self.graph:
            return
        # what is updated in place is an input
        given = [t for t in self.sets.sets[0] if t is not None]
        kept = {t.untyped_storage().data_ptr() for t in given}
        for t in self.results[0]:
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in kept:
                t.fill_(float("nan"))

    @contextlib.contextmanager
    def _aside(self):
        """On the contender's own stream, after what came before and before what comes after."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self):
        before = torch.cuda.current_stream()
        try:
            for call in self.calls:
                with self._aside():
                    call()
                    _expect_no_wait(call)
                graph = torch.cuda.CUDAGraph()
                # other libraries' threads do not break it
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    result = call()
                self.graphs.append(graph)
                self.results.append(result)
            self.graph = True
        except RuntimeError as error:
            # it waits, or leaves work on another stream; a failed capture leaves its own current
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            self.graphs, self.results = [], []
            self.why_no_graph = str(error).splitlines()[0]


def _expect_no_wait(call):
    """RuntimeError for a call that waits for the device; a capture of it could not be undone."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _outputs(returned, tensors, sets):
    """The outputs as a tuple; those updated in place where nothing is returned."""
    if returned is None and sets.op.updates:
        updated = sets.op.updates.values()
        return tuple(t for n, t in zip(sets.names, tensors) if n in updated)
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _bits(t):
    """A tensor's bytes, in which NaN equals itself."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
