"""Which elements of each op's results are compared at large shapes, and their computation.

Rows that do not depend on each other are compared with all that they depend on. Sums over all rows
are taken in blocks of rows; where a gradient is wide, some of its columns are compared.
"""

from __future__ import annotations

import threading

import numpy as np

from .._adam import adam
from .._adamw import adamw
from .._cross_entropy import cross_entropy, cross_entropy_backward, logit_gradient, row_losses
from .._dropout import drop, dropout_backward
from .._embedding import embedding, embedding_backward
from .._ffn import hidden, hidden_gradient
from .._layer_norm import layer_norm, layer_norm_backward
from .._linear import linear, linear_backward
from .._philox import keep_mask
from .._residual_layer_norm import residual_layer_norm, residual_layer_norm_backward
from .._rounding import chained, stored
from .._sample import sample
from ..oracle.adapters import Take
from ..oracle.sampled import ALL_RUNS, Part, blocks, runs_for, spread, taken_in

_ROWS, _COLUMNS = 256, 128
# what a formula of some functions costs an element, in multiplications of a product
_ELEMENTWISE = 64
# values of the compared rows together, and values in memory at once
_VALUES, _BLOCK = 2**22, 2**20


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _some_rows(n, width, rng):
    """Fewer rows where they are wide, but so many that statistics hold."""
    return spread(n, int(np.clip(_VALUES // max(width, 1), 32, _ROWS)), rng)


def _elements(shape, chosen):
    """Some elements of a tensor, counted in C order, as one row."""
    rows, columns = np.divmod(chosen, shape[-1])
    return Take(rows[None], columns[None])


def _joined(found):
    """{name: array} of blocks of rows, one after the other."""
    return {name: np.concatenate([np.asarray(f[name]) for f in found]) for name in found[0]}


def _added(found, rows):
    """{name: array} of sums over blocks of so many rows, added."""
    return {name: chained([f[name] for f in found], rows) for name in found[0]}


def _norm_parts(forward, backward, inputs, options, dys, rng):
    """Of a normalisation of rows: outputs and dx of some rows, some columns of dw and db."""
    *rows_of, w, b = inputs.values()
    names = list(inputs)[:-2]
    rows_of, outputs = [_flat(x) for x in rows_of], ("y", "h")[: len(names)]
    M, N = rows_of[0].shape
    chosen, columns = _some_rows(M, N, rng), spread(N, _COLUMNS, rng)

    def gradients(take, rows, columns, cache):
        dy = tuple(take(_flat(dys[name])[rows][:, columns]) for name in outputs)
        return backward(dy if len(dy) > 1 else dy[0], cache)

    def at_rows(arithmetic):
        take = taken_in(arithmetic)
        y, cache = forward(*(take(x[chosen]) for x in rows_of), take(w), take(b), **options)
        found = dict(zip(outputs, y if isinstance(y, tuple) else (y,)))
        if dys is not None:
            grads = gradients(take, chosen, slice(None), cache)
            found |= {f"d{n}": g for n, g in zip(names, grads)}
        return found

    def summed(arithmetic):
        take, found = taken_in(arithmetic), []
        for rows in blocks(M, _BLOCK // N):
            arrays = (take(x[rows]) for x in rows_of)
            _, (xhat, rstd, _, x, mean) = forward(*arrays, take(w), take(b), **options)
            kept = {"xhat": xhat[:, columns], "rstd": rstd, "x": x[:, columns], "mean": mean}
            found.append(kept)
        xhat, rstd, x, mean = (take(x) for x in _joined(found).values())
        cache = xhat, rstd, take(w[columns]), x, mean
        return dict(zip(("dw", "db"), gradients(take, slice(None), columns, cache)[-2:]))

    of_rows = [*outputs, *(f"d{n}" for n in names if dys is not None)]
    runs = runs_for(_ELEMENTWISE * len(chosen) * N)
    parts = [Part(dict.fromkeys(of_rows, Take(chosen)), at_rows, runs=runs)]
    if dys is not None:
        takes = dict.fromkeys(("dw", "db"), Take(np.array([0]), columns))
        parts.append(Part(takes, summed, runs=runs_for(_ELEMENTWISE * M * N)))
    return parts


def layer_norm_parts(*problem):
    """The parts of `layer_norm`."""
    return _norm_parts(layer_norm, layer_norm_backward, *problem)


def residual_layer_norm_parts(*problem):
    """The parts of `residual_layer_norm`."""
    return _norm_parts(residual_layer_norm, residual_layer_norm_backward, *problem)


def linear_parts(inputs, options, dys, rng):
    """The parts of `linear`: rows of y and dx, columns of dw and db."""
    x, w, b = _flat(inputs["x"]), inputs["w"], inputs["b"]
    rows = _some_rows(len(x), max(w.shape), rng)
    columns = spread(w.shape[1], _COLUMNS, rng)
    dy = None if dys is None else _flat(dys["y"])

    def at_rows(arithmetic):
        take = taken_in(arithmetic)
        y, cache = linear(take(x[rows]), take(w), take(b))
        return {"y": y} | ({} if dy is None else {"dx": linear_backward(take(dy[rows]), cache)[0]})

    def at_columns(arithmetic):
        take, found = taken_in(arithmetic), []
        some_dy = take(dy[:, columns])
        for some in blocks(len(x), _BLOCK // x.shape[1]):
            found.append({"dw": take(x[some]).T @ some_dy[some]})
        return _added(found, _BLOCK // x.shape[1]) | {"db": some_dy.sum(0)}

    runs = runs_for(len(rows) * w.size)
    of_rows = dict.fromkeys(("y", "dx")[: 1 if dy is None else 2], Take(rows))
    parts = [Part(of_rows, at_rows, runs=runs)]
    if dy is not None:
        takes = {"dw": Take(np.arange(len(w)), columns), "db": Take(np.array([0]), columns)}
        runs = runs_for(len(columns) * x.size)
        parts.append(Part(takes, at_columns, runs=runs))
    return parts


def ffn_parts(inputs, options, dys, rng):
    """The parts of `ffn`: rows of y and dx; columns of dw1, db1 and db2, and rows of dw2."""
    x, w1, b1, w2, b2, *residual = inputs.values()
    x, (C, F) = _flat(x), w1.shape
    residual = _flat(residual[0]) if residual else None
    activation = options.get("activation", "gelu_tanh")
    rows, units = _some_rows(len(x), F, rng), spread(F, _COLUMNS, rng)
    columns = spread(C, _COLUMNS, rng)
    dy = None if dys is None else _flat(dys["y"])

    def at_rows(arithmetic):
        take = taken_in(arithmetic)
        wide1, wide2 = take(w1), take(w2)
        z, a = hidden(take(x[rows]), wide1, take(b1), activation)
        found = {"y": a @ wide2 + take(b2)}
        if residual is not None:
            found["y"] = stored(found["y"]) + take(residual[rows])
        if dy is not None and residual is not None:
            found["dresidual"] = take(dy[rows])
        if dy is not None:
            found["dx"] = hidden_gradient(take(dy[rows]), wide2, z, activation) @ wide1.T
        return found

    def at_units(arithmetic):
        take, found, dzs = taken_in(arithmetic), [], []
        some1, some2, bias = take(w1[:, units]), take(w2[units]), take(b1[units])
        for some in blocks(len(x), _BLOCK // C):
            some_x, some_dy = take(x[some]), take(dy[some])
            z, a = hidden(some_x, some1, bias, activation)
            dz = hidden_gradient(some_dy, some2, z, activation)
            found.append({"dw1": some_x.T @ dz, "dw2": a.T @ some_dy})
            dzs.append({"dz": dz})
        biases = {"db1": take(_joined(dzs)["dz"]).sum(0), "db2": take(dy[:, columns]).sum(0)}
        return _added(found, _BLOCK // C) | biases

    names = ["y", "dx", *(["dresidual"] if residual is not None else [])]
    of_rows = dict.fromkeys(names[:1] if dy is None else names, Take(rows))
    parts = [Part(of_rows, at_rows, runs=runs_for(len(rows) * w1.size))]
    if dy is not None:
        one = np.array([0])
        takes = {
            "dw1": Take(np.arange(C), units),
            "db1": Take(one, units),
            "dw2": Take(units),
            "db2": Take(one, columns),
        }
        parts.append(Part(takes, at_units, runs=runs_for(len(units) * x.size)))
    return parts


class _Losses:
    """Cross-entropy of rows whose logits come in blocks.

    logits: logits(rows, take) -> (n, V), of some rows.
    """

    def __init__(self, logits, targets, V, options, dys, rng):
        self.logits, self.targets, self.V = logits, targets.reshape(-1), V
        self.shape, self.dys = targets.shape, dys
        self.ignore_index = options.get("ignore_index", -100)
        self.alpha = float(options.get("label_smoothing", 0.0))
        self.reduction = options.get("reduction", "mean")
        self.kept = self.targets != self.ignore_index
        self.rows = _some_rows(len(self.targets), V, rng)
        self._exact = None

    @property
    def take(self):
        """Which losses are compared."""
        if self.reduction != "none":
            return Take(np.array([0]))
        return _elements(self.shape, self.rows)

    def blocks(self, rows):
        return blocks(rows, _BLOCK // self.V)

    def of(self, rows, take):
        """(losses, what the backward keeps) of some rows."""
        return cross_entropy(
            self.logits(rows, take), self.targets[rows], reduction="none",
            ignore_index=self.ignore_index, label_smoothing=self.alpha,
        )  # fmt: skip

    def exact(self):
        """(loss, lse) of every row, in float64; kept."""
        if self._exact is None:
            found, take = [], taken_in(None)
            for rows in self.blocks(len(self.targets)):
                kept = self.kept[rows]
                index = np.where(kept, self.targets[rows], 0)[:, None]
                losses, lse, _ = row_losses(self.logits(rows, take), index, kept, self.alpha)
                found.append({"loss": losses, "lse": lse[:, 0]})
            self._exact = _joined(found)
        return self._exact

    def loss(self, arithmetic, at_rows):
        """The reduced loss, given the losses of the compared rows in this arithmetic."""
        if self.reduction == "none":
            return at_rows
        losses = self.exact()["loss"]
        if arithmetic is not None:
            # the other rows have errors like theirs
            errors = np.asarray(at_rows, np.float64) - losses[self.rows]
            losses = losses + np.where(self.kept, np.resize(errors, losses.shape), 0.0)
        losses = taken_in(arithmetic)(losses)
        return losses.sum() / self._count() if self.reduction == "mean" else losses.sum()

    def _count(self):
        return np.float64(self.kept.sum())

    def scales(self, rows, take):
        """dloss/count of some rows."""
        dloss = take(np.asarray(self.dys["loss"]).reshape(-1))
        if self.reduction == "none":
            return dloss[rows]
        return np.broadcast_to(dloss / (self._count() if self.reduction == "mean" else 1.0),
                               (len(rows),))  # fmt: skip


def cross_entropy_parts(inputs, options, dys, rng):
    """The parts of `cross_entropy`: rows of dlogits, and the loss."""
    logits = _flat(inputs["logits"])
    problem = _Losses(
        lambda rows, take: take(logits[rows]), inputs["targets"], logits.shape[1], options, dys, rng
    )

    def compute(arithmetic):
        take, found = taken_in(arithmetic), []
        for rows in problem.blocks(problem.rows):
            losses, cache = problem.of(rows, take)
            found.append({"loss": losses})
            if dys is not None:
                (found[-1]["dlogits"],) = cross_entropy_backward(problem.scales(rows, take), cache)
        found = _joined(found)
        found["loss"] = problem.loss(arithmetic, found["loss"])
        return found

    takes = {"loss": problem.take} | ({} if dys is None else {"dlogits": Take(problem.rows)})
    runs = runs_for(_ELEMENTWISE * len(problem.rows) * problem.V)
    return [Part(takes, compute, runs=runs)]


def linear_cross_entropy_parts(inputs, options, dys, rng):
    """The parts of `linear_cross_entropy`: the loss, rows of dx, some of the vocabulary's dw, db.

    A legal run of dw and db rounds the exact lse to float32, as a kernel keeps it.
    """
    x, w, b = _flat(inputs["x"]), inputs["w"], inputs["b"]
    kept = threading.local()

    def wide(take):
        """w in an arithmetic; one at a time in a thread, for it is large."""
        if getattr(kept, "take", None) is not take:
            kept.take, kept.w = take, take(w)
        return kept.w

    def logits(rows, take):
        return linear(take(x[rows]), wide(take).T, take(b))[0]

    problem = _Losses(logits, inputs["targets"], len(w), options, dys, rng)
    # a target's row has a gradient that stands out
    words = spread(len(w), _COLUMNS, rng, problem.targets[problem.kept][: _COLUMNS // 4])

    def at_rows(arithmetic):
        take, found = taken_in(arithmetic), []
        for rows in problem.blocks(problem.rows):
            losses, cache = problem.of(rows, take)
            found.append({"loss": losses})
            if dys is not None:
                (dlogits,) = cross_entropy_backward(problem.scales(rows, take), cache)
                found[-1]["dx"] = stored(dlogits) @ wide(take)
        found = _joined(found)
        found["loss"] = problem.loss(arithmetic, found["loss"])
        return found

    def at_words(arithmetic):
        take, found, all_dlogits = taken_in(arithmetic), [], []
        some_w, some_b = take(w[words]), take(None if b is None else b[words])
        lse = problem.exact()["lse"]
        for rows in blocks(len(x), _BLOCK // x.shape[1]):
            some_x = take(x[rows])
            p = np.exp(linear(some_x, some_w.T, some_b)[0] - take(lse[rows])[:, None])
            target = (1 - problem.alpha) * (problem.targets[rows][:, None] == words)
            dlogits = logit_gradient(
                problem.scales(rows, take), problem.kept[rows], p - target, problem.alpha / len(w)
            )
            dlogits = stored(dlogits)
            found.append({"dw": (some_x.T @ dlogits).T})
            all_dlogits.append({"dlogits": dlogits})
        found = _added(found, _BLOCK // x.shape[1])
        if b is None:
            return found
        return found | {"db": take(_joined(all_dlogits)["dlogits"]).sum(0)}

    takes = {"loss": problem.take} | ({} if dys is None else {"dx": Take(problem.rows)})
    parts = [Part(takes, at_rows, runs=runs_for(len(problem.rows) * w.size))]
    if dys is not None:
        takes = {"dw": Take(words)} | ({} if b is None else {"db": Take(np.array([0]), words)})
        parts.append(Part(takes, at_words, runs=runs_for(len(words) * x.size)))
    return parts


def embedding_parts(inputs, options, dys, rng):
    """The parts of `embedding`: rows of y; of dwte some tokens, of dwpe some positions."""
    tokens, wte, wpe = inputs.values()
    T = tokens.shape[-1]
    flat, positions = tokens.reshape(-1), np.resize(np.arange(T), tokens.size)
    rows = _some_rows(tokens.size, wte.shape[1], rng)

    def at_rows(arithmetic):
        take = taken_in(arithmetic)
        ids, where = np.arange(len(rows)), np.arange(len(rows))
        y, _ = embedding(ids, take(wte[flat[rows]]), take(wpe[positions[rows]]), where)
        return {"y": y}

    def summed(name, table, index, chosen):
        """The gradient of some rows of a table."""

        def compute(arithmetic):
            take = taken_in(arithmetic)
            order = np.full(len(table), -1)
            order[chosen] = np.arange(len(chosen))
            used = np.flatnonzero(order[index] >= 0)
            _, cache = embedding(order[index[used]], take(table[chosen]))
            return {name: embedding_backward(take(_flat(dys["y"])[used]), cache)[0]}

        return Part({name: Take(chosen)}, compute, runs=ALL_RUNS)

    parts = [Part({"y": Take(rows)}, at_rows, runs=ALL_RUNS)]
    if dys is not None:
        some = spread(len(wte), _ROWS, rng, flat[: _ROWS // 4])
        parts.append(summed("dwte", wte, flat, some))
        parts.append(summed("dwpe", wpe, positions, spread(len(wpe), _ROWS, rng)))
    return parts


def dropout_parts(inputs, options, dys, rng):
    """The parts of `dropout`: some rows."""
    x = _flat(inputs["x"])
    rows = _some_rows(*x.shape, rng)
    p, seed = options["p"], options["seed"]

    def compute(arithmetic):
        take = taken_in(arithmetic)
        kept = keep_mask(rows[:, None] * x.shape[1] + np.arange(x.shape[1]), p, seed)
        y, cache = drop(take(x[rows]), kept, p)
        if dys is None:
            return {"y": y}
        return {"y": y, "dx": dropout_backward(take(_flat(dys["y"])[rows]), cache)[0]}

    names = ("y",) if dys is None else ("y", "dx")
    return [Part(dict.fromkeys(names, Take(rows)), compute, runs=ALL_RUNS)]


def adamw_parts(*problem):
    """The parts of `adamw`."""
    return _step_parts(adamw, *problem)


def adam_parts(*problem):
    """The parts of `adam`."""
    return _step_parts(adam, *problem)


def _step_parts(step, inputs, options, dys, rng):
    """Of a step of an optimiser: some rows."""
    state = [_flat(x) for x in inputs.values()]
    rows = _some_rows(*state[0].shape, rng)

    def compute(arithmetic):
        take = taken_in(arithmetic)
        (p, m, v), _ = step(*(take(x[rows]) for x in state), **options)
        return {"p": p, "m": m, "v": v}

    return [Part(dict.fromkeys(("p", "m", "v"), Take(rows)), compute, runs=ALL_RUNS)]


def sample_parts(inputs, options, dys, rng):
    """The parts of `sample`: some rows."""
    logits, u = _flat(inputs["logits"]), inputs["u"]
    rows = _some_rows(*logits.shape, rng)
    wide = {"logits": logits[rows].astype(np.float64), "u": u.reshape(-1)[rows].astype(np.float64)}

    if "previous" in inputs:
        wide["previous"] = _flat(inputs["previous"])[rows]

    runs = runs_for(_ELEMENTWISE * len(rows) * logits.shape[1])

    def compute(arithmetic):
        return {"token": sample(**wide, **options)[0]}

    return [Part({"token": _elements(u.shape, rows)}, compute, inputs=wide, runs=runs)]
