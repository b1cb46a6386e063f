"""How a candidate of each framework is called: NumPy arrays in, answers and gradients out.

An adapter opens a session for the arguments of one call. The session places them in memory of its
own, with a layout and red zones around each, calls the candidate, and says afterwards what was
written where nothing may be. Frameworks are imported when used.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset", "broadcast_grad", "bthd")
FRAMEWORKS = ("torch", "numpy", "jax", "cupy")
# elements around an argument that nobody may write, and whose values nobody may use
_RED_ZONE = 64
_ALIGNMENT = 64


@dataclass(frozen=True)
class Answer:
    """What a candidate returned: float64 values and the name of the dtype they came in.

    Where a part was asked for, `values` are those rows, `shape` is that of the whole tensor, and
    `finite` says whether all of the whole is.
    """

    values: np.ndarray
    dtype: str
    shape: tuple | None = None
    finite: bool = True


@dataclass(frozen=True)
class Take:
    """Elements of a tensor, seen as rows along its last axis; a scalar is one row of one.

    rows:    which rows, counted in C order; or (rows, 1 or n), the row of each element.
    columns: which of their elements, the same for all rows or (rows, n); all for None.
    """

    rows: np.ndarray
    columns: np.ndarray | None = None

    def of(self, shape):
        """An index into a tensor of this shape, one array for each axis."""
        if not shape:
            return ()
        columns = np.arange(shape[-1]) if self.columns is None else self.columns
        columns = np.broadcast_to(columns, (len(self.rows), columns.shape[-1]))
        rows = self.rows if self.rows.ndim > 1 else self.rows[:, None]
        leading = np.unravel_index(rows, shape[:-1]) if len(shape) > 1 else ()
        return (*leading, columns)


class WrongForm(Exception):
    """A candidate's answer is no tensor, on another device, or too few of them."""


def adapter(framework, device="cpu", backward=True):
    """The adapter of a framework; `backward` is True, False or a function."""
    own = backward if callable(backward) else None
    if framework not in FRAMEWORKS:
        raise ValueError(
            f"check: framework must be torch or numpy or jax or cupy, got {framework!r}"
        )
    if framework == "torch":
        return TorchAdapter(device, own)
    if framework == "jax":
        return JaxAdapter(own)
    if backward is True:
        raise ValueError(
            f"check: backward must be a function or False for {framework}, got True; "
            "give backward=callable(do, *inputs, **options)"
        )
    return NumpyAdapter(own) if framework == "numpy" else CupyAdapter(own)


class Adapter:
    """What all frameworks share. `not_checked` says what this one cannot look into."""

    device = "cpu"
    not_checked: tuple[str, ...] = ()
    # the layouts that make a difference, where not all do
    layouts: tuple[str, ...] | None = None

    def __init__(self, backward=None):
        self.backward = backward
        # entered around every call of the candidate, to watch the time it takes
        self.watch = contextlib.nullcontext

    def run(self, fn, inputs, options, dys, layout="contiguous", **names):
        """([Answer of each output], [Answer of each gradient]) of one call at new addresses."""
        return self.open(inputs, options, dys, layout, **names).run(fn)

    @contextlib.contextmanager
    def poisoned(self):
        """While it lasts, memory that the candidate allocates holds NaN."""
        yield


class Session:
    """The arguments of a candidate in memory of the oracle's own.

    gradients: names of the inputs that have gradients; all floating ones by default.
    updates:   {output: input} that the candidate may update in place and return nothing.
    take:      [(shape, Take) of each output] and of each gradient where parts of them will do.
    """

    def __init__(
        self, adapter, inputs, options, dys, layout, gradients=None, updates=None, take=None
    ):
        self.adapter, self.layout, self.updates = adapter, layout, dict(updates or {})
        self.take = take
        given = {n: x for n, x in inputs.items() if x is not None}
        floating = [n for n, x in given.items() if x.dtype.kind not in "iu"]
        self.gradients = floating if gradients is None else list(gradients)
        self.arguments = {n: self.place(self._turn(x)) for n, x in given.items()}
        # in the order of the op's inputs, None where an optional one is left out
        self.positions = list(inputs)
        lists = {
            n: np.array(v, np.int32) for n, v in options.items() if isinstance(v, (tuple, list))
        }
        self.lists = {n: self.place(x) for n, x in lists.items()}
        for n, x in lists.items():
            self.lists[n].fill(x)
        self.options = {**options, **{n: placed.tensor for n, placed in self.lists.items()}}
        self.seeds = []
        self.refill(inputs, dys)

    def refill(self, inputs, dys):
        """New content at the same addresses."""
        self.dys = dys
        for name, placed in self.arguments.items():
            placed.fill(self._turn(inputs[name]))

    def _tensors(self):
        return [self.arguments[n].tensor if n in self.arguments else None for n in self.positions]

    def damage(self):
        """What the candidate wrote where it may not, in words."""
        found = []
        for name, placed in [*self.arguments.items(), *self.lists.items(), *self.seeds]:
            found += [f"{what} {name}" for what in placed.damage(name in self.updates.values())]
        return found

    def _layout_of(self, x):
        """Indices are not made to repeat, nor is NaN: it would come to where it is seen."""
        apart = x.dtype.kind in "iu" or not np.isfinite(x).all()
        return "contiguous" if self.layout == "expanded" and apart else self.layout

    def _turn(self, x):
        """(B, H, T, D) as (B, T, H, D), and back, where the candidate wants it so."""
        return x.swapaxes(1, 2) if self.layout == "bthd" and np.ndim(x) == 4 else x

    def _outputs(self, result, kind):
        """The candidate's outputs as a tuple; those it updated in place where it returns None."""
        if result is None and self.updates:
            return tuple(self.arguments[name].tensor for name in self.updates.values())
        outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        for output in outputs:
            if not isinstance(output, kind):
                raise WrongForm(f"must return tensors, returned {type(output).__name__}")
        return outputs

    def answers(self, tensors, part):
        """`Answer` of each output (part 0) or gradient (part 1)."""
        if self.take is None:
            return [self._answer(t) for t in tensors]
        takes = self.take[part]
        # more tensors than there must be are a failure of their own
        return [self._part(self._turn(t), *take) for t, take in zip(tensors, takes)] + [
            Answer(np.zeros(0), "", ()) for _ in tensors[len(takes) :]
        ]

    def _part(self, t, shape, take):
        """`Answer` with a part of a tensor."""
        got = tuple(map(int, t.shape))
        if got != shape:
            return Answer(np.zeros(0), self._dtype(t), got)
        values, finite = self._taken(t, take.of(shape))
        rows = np.asarray(values, np.float64).reshape(len(take.rows), -1)
        return Answer(rows, self._dtype(t), got, finite)

    def _cotangent(self, dy, y):
        """The output gradient in the form of the output."""
        dy = self._turn(np.asarray(dy))
        if dy.shape != tuple(y.shape):
            raise WrongForm(f"must return shape {dy.shape}, returned {tuple(y.shape)}")
        return dy


class Placed:
    """An array in storage of its own: laid out, between red zones. `flat` is the storage."""

    def __init__(self, x, layout, wrap):
        shape, strides = x.shape, _strides(x.shape, layout)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if x.size else 0
        shift = 1 if layout == "offset" else 0
        self.offset = _RED_ZONE + shift
        self.flat, self.tensor = wrap(
            _storage(self.offset + extent + _RED_ZONE, x.dtype), self.offset, shape, strides
        )


class NumpyPlaced(Placed):
    xp = np

    def __init__(self, x, layout):
        super().__init__(x, layout, self._wrap)

    @classmethod
    def _wrap(cls, storage, offset, shape, strides):
        flat = cls.xp.asarray(storage)
        strides = [s * storage.itemsize for s in strides]
        return flat, cls.xp.lib.stride_tricks.as_strided(flat[offset:], shape, strides)

    def fill(self, x):
        self.tensor[...] = self.xp.asarray(x)
        self.content = self.tensor.copy()
        self.before = self.flat.view(np.uint8).copy()

    def damage(self, updated):
        changed = self.tensor.tobytes() != self.content.tobytes()
        self.tensor[...] = self.content
        outside = not bool((self.flat.view(np.uint8) == self.before).all())
        return _damage(changed and not updated, outside)


class NumpySession(Session):
    xp = np
    placed = NumpyPlaced

    def place(self, x):
        return self.placed(np.asarray(x), self._layout_of(x))

    def run(self, fn):
        arrays = self._tensors()
        kind = self.xp.ndarray | np.generic
        with self.adapter.watch():
            outputs = self._outputs(fn(*arrays, **self.options), kind)
            answers = self.answers(outputs, 0)
            if self.dys is None:
                return answers, []
            seeds = [self._cotangent(dy, y) for dy, y in zip(self.dys, outputs)]
            # an output gradient has the dtype of the output
            seeds = [self.xp.asarray(dy, dtype=y.dtype) for dy, y in zip(seeds, outputs)]
            seed = tuple(seeds) if len(seeds) > 1 else seeds[0]
            grads = self.adapter.backward(seed, *arrays, **self.options)
            grads = self._outputs(grads, kind)
        return answers, self.answers(grads, 1)

    def _answer(self, x):
        host = np.asarray(x.get() if hasattr(x, "get") else x)
        return Answer(self._turn(np.array(host, dtype=np.float64)), host.dtype.name)

    def _taken(self, x, index):
        finite = bool(self.xp.isfinite(x).all())
        values = x[tuple(map(self.xp.asarray, index))]
        return values.get() if hasattr(values, "get") else values, finite

    @staticmethod
    def _dtype(x):
        return x.dtype.name


class NumpyAdapter(Adapter):
    """NumPy functions; gradients through `backward(do, *inputs, **options)`."""

    not_checked = ("writes past the ends of arrays that the candidate allocates",)

    def open(self, *arguments, **names):
        return NumpySession(self, *arguments, **names)

    @contextlib.contextmanager
    def poisoned(self):
        empty, empty_like = np.empty, np.empty_like

        def poison(x):
            if x.dtype.kind not in "iub":
                x.fill(np.nan)
            return x

        np.empty = lambda *a, **k: poison(empty(*a, **k))
        np.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
        try:
            yield
        finally:
            np.empty, np.empty_like = empty, empty_like


class CupyAdapter(Adapter):
    """CuPy functions on CUDA arrays; gradients as for NumPy."""

    device = "cuda"
    not_checked = (
        "memory that the candidate allocates, which CuPy does not fill",
        "writes past the ends of arrays that the candidate allocates",
    )

    def open(self, *arguments, **names):
        import cupy

        class Placed(NumpyPlaced):
            xp = cupy

        class CupySession(NumpySession):
            xp = cupy
            placed = Placed

        return CupySession(self, *arguments, **names)


class TorchPlaced(Placed):
    def __init__(self, x, layout, device):
        import torch

        self.torch, self.device = torch, device
        super().__init__(x, layout, self._wrap)

    def _wrap(self, storage, offset, shape, strides):
        flat = as_torch(self.torch, storage).to(self.device)
        return flat, flat.as_strided(shape, strides, offset)

    def fill(self, x):
        with self.torch.no_grad():
            x = as_torch(self.torch, np.ascontiguousarray(x).reshape(x.shape))
            # an expanded tensor has one row to fill
            view = self.tensor.detach()
            if 0 in view.stride()[:1] and view.shape[0] > 1:
                view, x = view[:1], x[:1]
            view.copy_(x)
            self.content = self.tensor.detach().clone()
            self.before = self._bytes().clone()

    def damage(self, updated):
        torch = self.torch
        with torch.no_grad():
            now, then = (t.contiguous().view(torch.uint8) for t in self._contents())
            changed = not torch.equal(now, then)
            view, content = self.tensor.detach(), self.content
            if 0 in view.stride()[:1] and view.shape[0] > 1:
                view, content = view[:1], content[:1]
            view.copy_(content)
        return _damage(changed and not updated, not torch.equal(self._bytes(), self.before))

    def _contents(self):
        # a scalar has no bytes to view
        return self.tensor.detach().reshape(-1), self.content.reshape(-1)

    def _bytes(self):
        return self.flat.view(self.torch.uint8)


class TorchSession(Session):
    def place(self, x):
        return TorchPlaced(np.asarray(x), self._layout_of(x), self.adapter.device)

    def run(self, fn):
        torch, own = self.adapter.torch, self.adapter.backward
        tensors = self._tensors()
        floating = [self.arguments[name].tensor for name in self.gradients]
        differentiate = self.dys is not None and own is None
        for t in floating:
            t.requires_grad_(differentiate)
        with self.adapter.watch():
            with torch.set_grad_enabled(differentiate):
                outputs = self._outputs(fn(*tensors, **self.options), torch.Tensor)
            for y in outputs:
                if y.device != tensors[0].device:
                    raise WrongForm(
                        f"must return tensors on {tensors[0].device}, one on {y.device}"
                    )
            answers = self.answers(outputs, 0)
            if self.dys is None:
                return answers, []
            seeds = [self._seed(dy, y) for dy, y in zip(self.dys, outputs)]
            if not differentiate:
                seed = tuple(seeds) if len(seeds) > 1 else seeds[0]
                with torch.no_grad():
                    grads = own(seed, *tensors, **self.options)
                return answers, self.answers(self._outputs(grads, torch.Tensor), 1)
            paths = [(y, dy) for y, dy in zip(outputs, seeds) if y.requires_grad]
            grads = [None] * len(floating)
            if paths:
                ys, dys = zip(*paths)
                grads = torch.autograd.grad(ys, floating, dys, allow_unused=True)
            # an output without a gradient path counts as zero gradients
            grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, floating)]
            return answers, self.answers(grads, 1)

    def _seed(self, dy, y):
        """The output gradient in memory of its own, or one value expanded to all."""
        torch = self.adapter.torch
        dy = np.array(self._cotangent(dy, y), order="C")
        dy = as_torch(torch, dy).to(y.device, y.dtype)
        one = self.layout == "broadcast_grad" and dy.numel() > 0
        values = _as_numpy(dy.flatten()[:1] if one else dy)
        layout = self.layout if self.layout in ("transposed", "sliced", "offset") else "contiguous"
        placed = TorchPlaced(values, layout, y.device)
        placed.fill(values)
        self.seeds.append((f"the gradient of output {len(self.seeds)}", placed))
        # the one value lies alone: a kernel that takes its stride for 1 reads NaN
        return placed.tensor.reshape(()).expand(y.shape) if one else placed.tensor

    def _answer(self, t):
        values = t.detach().double().cpu().numpy()
        return Answer(self._turn(np.array(values)), self._dtype(t))

    def _taken(self, t, index):
        t = t.detach()
        index = tuple(self.adapter.torch.from_numpy(np.array(i)).to(t.device) for i in index)
        # a block at a time: the test needs tensors of the same size
        longest = max(range(t.ndim), key=lambda axis: t.shape[axis], default=None)
        blocks = (t,) if longest is None else t.chunk(-(-t.numel() // 2**24) or 1, longest)
        finite = all(bool(self.adapter.torch.isfinite(b).all()) for b in blocks)
        return t[index].double().cpu().numpy(), finite

    @staticmethod
    def _dtype(t):
        return str(t.dtype).removeprefix("torch.")

    def refill(self, inputs, dys):
        self.seeds = []
        super().refill(inputs, dys)


class TorchAdapter(Adapter):
    """Torch functions, differentiated through autograd unless `backward` is given."""

    not_checked = ("writes past the ends of tensors that the candidate allocates",)

    def __init__(self, device="cpu", backward=None):
        super().__init__(backward)
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

    def open(self, *arguments, **names):
        return TorchSession(self, *arguments, **names)

    @contextlib.contextmanager
    def poisoned(self):
        torch = self.torch
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*deterministic.*")
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]


class _Constant:
    """An array of a framework whose arrays never change: nothing to lay out or to damage."""

    def __init__(self, x, convert):
        self.convert = convert
        self.fill(x)

    def fill(self, x):
        self.tensor = self.convert(x)

    def damage(self, updated):
        return []


class JaxSession(Session):
    def place(self, x):
        import jax.numpy as jnp

        def convert(x):
            # without x64 mode JAX has no wide integers
            return jnp.asarray(x.astype(np.int32) if x.dtype.kind in "iu" else x)

        return _Constant(x, convert)

    def run(self, fn):
        import jax
        import jax.numpy as jnp

        arrays = dict(zip(self.positions, self._tensors()))
        varied = [arrays[name] for name in self.gradients]

        def call(*varied):
            given = {**arrays, **dict(zip(self.gradients, varied))}
            return self._outputs(fn(*given.values(), **self.options), jax.Array)

        own = self.adapter.backward
        with self.adapter.watch():
            if self.dys is None or own is not None:
                outputs = call(*varied)
            else:
                outputs, pull = jax.vjp(call, *varied)
            answers = self.answers(outputs, 0)
            if self.dys is None:
                return answers, []
            seeds = tuple(
                jnp.asarray(self._cotangent(dy, y), y.dtype) for dy, y in zip(self.dys, outputs)
            )
            if own is None:
                grads = pull(seeds)
            else:
                seed = seeds if len(seeds) > 1 else seeds[0]
                grads = self._outputs(own(seed, *arrays.values(), **self.options), jax.Array)
        return answers, self.answers(grads, 1)

    def _answer(self, x):
        return Answer(self._turn(np.asarray(x).astype(np.float64)), x.dtype.name)

    def _taken(self, x, index):
        import jax.numpy as jnp

        return np.asarray(x[tuple(index)]).astype(np.float64), bool(jnp.isfinite(x).all())

    @staticmethod
    def _dtype(x):
        return x.dtype.name


class JaxAdapter(Adapter):
    """JAX functions, differentiated through `jax.vjp` unless `backward` is given."""

    not_checked = ("memory: JAX allocates and protects arrays itself", "layouts: JAX has none")
    layouts = ("contiguous",)

    def open(self, *arguments, **names):
        return JaxSession(self, *arguments, **names)


def _strides(shape, layout):
    """Strides in elements."""
    shape = [max(n, 1) for n in shape]
    order = list(range(len(shape)))
    pitch = shape[-1] if shape else 1
    if layout == "transposed" and len(shape) > 1:
        # heads innermost for (B, H, T, D), columns innermost for matrices
        a, b = (1, 2) if len(shape) > 2 else (0, 1)
        order[a], order[b] = order[b], order[a]
    if layout == "sliced" and len(shape) > 1:
        pitch = 2 * shape[-1] + 3
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        last = axis == len(shape) - 1
        step *= pitch if last else shape[axis]
    if layout == "expanded" and len(shape) > 1:
        strides[0] = 0
    return strides


def _storage(length, dtype):
    """A flat array whose first element past the red zone is aligned; NaN, or 0 for integers."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.zeros(length * itemsize + _ALIGNMENT, np.uint8)
    start = -(raw.ctypes.data + _RED_ZONE * itemsize) % _ALIGNMENT
    storage = raw[start : start + length * itemsize].view(dtype)
    if storage.dtype.kind not in "iub":
        storage[...] = np.nan
    return storage


def _damage(changed, outside):
    found = ["changed"] if changed else []
    return [*found, "wrote outside"] if outside else found


def as_torch(torch, x):
    """The tensor of an array, bytes unchanged; on a CPU they share memory."""
    names = {
        "bfloat16": (np.int16, "bfloat16"),
        "float8_e4m3fn": (np.uint8, "float8_e4m3fn"),
        "float8_e5m2": (np.uint8, "float8_e5m2"),
    }
    if x.dtype.name not in names:
        return torch.from_numpy(x)
    bits, name = names[x.dtype.name]
    return torch.from_numpy(x.view(bits)).view(getattr(torch, name))


def _as_numpy(t):
    """The array of a tensor on any device, with the dtype's bytes."""
    import ml_dtypes

    name = str(t.dtype).removeprefix("torch.")
    t = t.detach().cpu()
    if name == "bfloat16":
        return t.view(t.new_empty(0).short().dtype).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()
