"""Which elements of attention's results are compared at large shapes, and their computation.

Some groups of heads that share a key head are chosen. A query row needs its own q and the keys it
sees. A key row needs lse and delta of every query that sees it; these are exact first, block by
block. A legal run has errors in lse, and in the o that delta comes from; it computes them for a few
queries, and the others get errors like those of queries near them.
"""

from __future__ import annotations

import numpy as np

from .._additive_attention import additive_attention, additive_attention_backward
from .._attention import attend, key_gradients, score_gradient, visible_keys, weights_again
from .._paged_attention import paged_attention
from .._philox import keep_mask
from .._rounding import chained
from ..oracle.adapters import Take
from ..oracle.sampled import Part, blocks, runs_for, spread, taken_in

# query rows, and key rows, that are compared over all groups at least
_ROWS = 256
_LEAST_ROWS = 32
_GROUPS = 8
# columns of the weights of additive attention
_COLUMNS = 32
# queries whose errors stand for those of all
_ERROR_ROWS = 32
# the exact pass over all queries of a group costs so many multiplications at most, or one group
_PRODUCTS = 2**35
# scores in memory at once: exact ones, and those of legal runs, which stay in a cache
_SCORES, _LEGAL_SCORES = 2**19, 2**19
_MASKS = ("causal", "align", "window", "stride", "global_tokens", "cu_seqlens")


def attention_parts(inputs, options, dys, rng):
    """The parts of `attention`, of dot products alone: no case with cosines is timed."""
    if options.get("score", "dot") != "dot":
        raise ValueError(f"attention: score must be dot in a bench case, got {options['score']!r}")
    problem = _Problem(inputs, options, dys)
    B, Hkv, repeats = problem.B, problem.Hkv, problem.repeats
    chosen = [int(g) for g in spread(B * Hkv, _GROUPS, rng)]
    n, heads = len(chosen), len(chosen) * repeats
    parts = [
        problem.query_part(divmod(g, Hkv), _indices(problem.Tq, heads, rng), n) for g in chosen
    ]
    if dys is None:
        return parts
    products = repeats * problem.Tq * problem.Tk * problem.D
    most = int(np.clip(_PRODUCTS // max(products, 1), 1, _GROUPS))
    # the last group too where there are several, or some group where there is time for one
    chosen = spread(B * Hkv, most, rng) if most > 1 else rng.integers(B * Hkv, size=1)
    n = len(chosen)
    return parts + [
        problem.key_part(divmod(int(g), Hkv), _indices(problem.Tk, n, rng), n) for g in chosen
    ]


def _indices(n, groups, rng):
    return spread(n, max(-(-_ROWS // groups), _LEAST_ROWS), rng)


class _Problem:
    def __init__(self, inputs, options, dys):
        self.q, self.k, self.v = inputs["q"], inputs["k"], inputs["v"]
        (self.B, self.H, self.Tq, self.D), (_, self.Hkv, self.Tk, _) = self.q.shape, self.k.shape
        self.repeats = self.H // self.Hkv
        self.options, self.dys = options, dys
        scale = options.get("scale")
        self.scale = self.D**-0.5 if scale is None else float(scale)
        self.return_lse = bool(options.get("return_lse"))

    def query_part(self, group, queries, groups):
        """o, lse and dq of some queries of the heads that read one key head."""
        b, heads, _ = self._heads(group)
        rows = _rows(b * self.H + heads, queries, self.Tq)
        takes = {"o": Take(rows)}
        if self.return_lse:
            takes["lse"] = Take(b * self.H + heads, queries)
        if self.dys is not None:
            takes["dq"] = Take(rows)

        def compute(arithmetic):
            found = self._some_queries(group, queries, arithmetic, self.dys is not None)
            return {name: found[name] for name in takes}

        # a query that sees nothing has lse = −∞
        runs = runs_for(groups * self.repeats * len(queries) * self.Tk * self.D)
        return Part(takes, compute, infinite=("lse",), runs=runs)

    def _some_queries(self, group, queries, arithmetic, gradients):
        """{"o", "lse", "dq"} (heads, queries, …), a block at a time."""
        most = (_SCORES if arithmetic is None else _LEGAL_SCORES) // (self.repeats * self.Tk)
        found = [
            self._queries(group, rows, arithmetic, gradients) for rows in blocks(queries, most)
        ]
        return {name: np.concatenate([np.asarray(f[name]) for f in found], 1) for name in found[0]}

    def _queries(self, group, queries, arithmetic, gradients):
        b, heads, h = self._heads(group)
        take = taken_in(arithmetic)
        visible = self._visible(b, queries)
        keys = np.flatnonzero(visible.any((0, 1, 2)))
        # nobody sees this one
        keys = keys if keys.size else np.array([0])
        visible = visible[..., keys]
        q = take(self.q[b, heads][None, :, queries])
        k, v = (take(x[b, h][keys][None, None]) for x in (self.k, self.v))
        keep = self._keep(b, heads, queries, keys)
        (o, lse), cache = attend(q, k, v, visible, keep, self.scale)
        found = {"o": o[0], "lse": lse[0]}
        if gradients:
            do, dlse = self._gradients(b, heads, queries, take)
            p, do = weights_again(do, cache)
            ds = score_gradient(p, do, dlse, cache)
            found["dq"] = (self.scale * (ds @ cache[1]))[0]
        return found

    def key_part(self, group, keys, groups):
        """dk and dv of some keys of one key head."""
        b, _, h = self._heads(group)
        rows = _rows(np.array([b * self.Hkv + h]), keys, self.Tk)
        statistics = []

        def compute(arithmetic):
            if not statistics:
                statistics.append(self._statistics(group))
            lse, delta, o = statistics[0]
            if arithmetic is not None:
                lse, delta = self._legal_statistics(group, lse, o, arithmetic)
            most = (_SCORES if arithmetic is None else _LEGAL_SCORES) // (self.repeats * self.Tq)
            found = [self._keys(group, some, arithmetic, lse, delta) for some in blocks(keys, most)]
            dk, dv = (np.concatenate([np.asarray(x) for x in xs], axis=2) for xs in zip(*found))
            return {"dk": dk, "dv": dv}

        runs = runs_for(groups * self.repeats * len(keys) * self.Tq * self.D)
        return Part({"dk": Take(rows), "dv": Take(rows)}, compute, runs=runs)

    def _statistics(self, group):
        """lse, delta (heads, Tq) and o (heads, Tq, D), which is exact enough to be rounded."""
        b, heads, h = self._heads(group)
        lse = np.full((len(heads), self.Tq), -np.inf)
        delta = np.zeros((len(heads), self.Tq))
        o = np.zeros((len(heads), self.Tq, self.D), np.float32)
        k, v = (x[b, h].astype(np.float64) for x in (self.k, self.v))
        for some in blocks(self.Tq, _SCORES // self.Tk):
            visible = self._visible(b, some)
            sees = visible.any((0, 1, 2))
            if not sees.any():
                continue
            # a slice is no copy, and there is seldom a gap in it
            near = np.flatnonzero(sees)
            keys = slice(near[0], near[-1] + 1)
            for i, head in enumerate(heads):
                q = self.q[b, head, some][None, None].astype(np.float64)
                keep = self._keep(b, heads[i : i + 1], some, np.arange(self.Tk)[keys])
                (found, found_lse), _ = attend(
                    q, k[None, None, keys], v[None, None, keys], visible[..., keys], keep,
                    self.scale,
                )  # fmt: skip
                do, _ = self._gradients(b, heads[i : i + 1], some, taken_in(None))
                do = np.where(visible.any(-1)[..., None], do, 0.0)
                o[i, some], lse[i, some] = found[0, 0], found_lse[0, 0]
                delta[i, some] = (do * found).sum(-1)[0, 0]
        return lse, delta, o

    def _legal_statistics(self, group, lse, o, arithmetic):
        """lse and delta (heads, Tq) with errors of a legal run."""
        b, heads, _ = self._heads(group)
        seeing = np.flatnonzero(np.isfinite(lse[0]))
        if not seeing.size:
            return lse, np.zeros_like(lse)
        draw = np.random.default_rng(0)
        some = seeing[spread(len(seeing), _ERROR_ROWS, draw)]
        found = self._some_queries(group, some, arithmetic, gradients=False)
        norm = _norm(o)
        lse_error = np.asarray(found["lse"], np.float64) - lse[:, some]
        o_error = (np.asarray(found["o"]) - o[:, some]) / norm[:, some]
        near = np.searchsorted(some, np.arange(self.Tq)) + draw.integers(-2, 3, self.Tq)
        near = np.clip(near, 0, len(some) - 1)

        take, deltas = taken_in(arithmetic), []
        for rows in blocks(self.Tq, _LEGAL_SCORES // (self.repeats * self.D)):
            do, _ = self._gradients(b, heads, rows, take)
            legal = o[:, rows] + o_error[:, near[rows]] * norm[:, rows]
            deltas.append(np.asarray((do * take(legal[None])).sum(-1)[0]))
        return lse + lse_error[:, near], np.concatenate(deltas, axis=1)

    def _keys(self, group, keys, arithmetic, lse, delta):
        b, heads, h = self._heads(group)
        take = taken_in(arithmetic)
        visible = self._visible(b, np.arange(self.Tq), keys)
        queries = np.flatnonzero(visible.any((0, 1, 3)))
        visible = visible[:, :, queries]
        q = take(self.q[b, heads][None, :, queries])
        k, v = (take(x[b, h][keys][None, None]) for x in (self.k, self.v))
        do, dlse = self._gradients(b, heads, queries, take)
        lse = take(lse[None, :, queries, None])
        delta = take(delta[None, :, queries, None])
        if dlse is not None:
            delta = delta - dlse[..., None]
        keep = self._keep(b, heads, queries, keys)
        return key_gradients(do, q, k, v, lse, delta, visible, keep, self.scale)

    def _heads(self, group):
        """(batch row, query heads, key head) of a group."""
        b, h = group
        return b, h * self.repeats + np.arange(self.repeats), h

    def _visible(self, b, queries, keys=None):
        options = {name: self.options[name] for name in _MASKS if name in self.options}
        lengths = self.options.get("lengths")
        if lengths is not None:
            options["lengths"] = np.asarray(lengths)[b : b + 1]
        return visible_keys(self.Tq, self.Tk, queries=queries, keys=keys, **options)

    def _keep(self, b, heads, queries, keys):
        """Which weights dropout keeps, and what it multiplies them with."""
        p = self.options.get("dropout", 0.0)
        if not p:
            return None
        row = (b * self.H + heads)[:, None] * self.Tq + queries
        index = row[None, :, :, None] * self.Tk + keys
        return keep_mask(index, p, self.options.get("seed", 0)), 1 / (1 - p or 1)

    def _gradients(self, b, heads, queries, take):
        do = take(self.dys["o"][b, heads][None, :, queries])
        if not self.return_lse:
            return do, None
        return do, take(self.dys["lse"][b, heads][None, :, queries])


def _norm(o):
    """The root mean square of rows, 1 where it is 0."""
    norm = np.sqrt(np.mean(np.square(o), -1, keepdims=True))
    return np.where(norm == 0, 1.0, norm)


def _rows(heads, positions, T):
    """The rows of a (B, H, T, D) tensor that lie at some positions of some heads, b·H + h."""
    return (heads[:, None] * T + positions).ravel()


def paged_attention_parts(inputs, options, dys, rng):
    """The parts of `paged_attention`: some rows of the batch."""
    q, table = inputs["q"], inputs["block_table"]
    B, H, Tq, _ = q.shape
    page = inputs["k_pages"].shape[2]

    def part(b):
        used = -(-int(inputs["lengths"][b]) // page)
        pages = table[b, :used] if used else np.zeros(1, int)
        # the pages that the row uses, in its order
        own = np.arange(len(pages))[None]

        def compute(arithmetic):
            take = taken_in(arithmetic)
            k, v = (take(inputs[name][pages]) for name in ("k_pages", "v_pages"))
            lengths = inputs["lengths"][b : b + 1]
            o, _ = paged_attention(take(q[b : b + 1]), k, v, own, lengths, **options)
            return {"o": o}

        runs = runs_for(q[0].size * len(pages) * page)

        rows = _rows(b * H + np.arange(H), np.arange(Tq), Tq)
        return Part({"o": Take(rows)}, compute, runs=runs)

    return [part(int(b)) for b in spread(B, _GROUPS, rng)]


def additive_attention_parts(inputs, options, dys, rng):
    """The parts of `additive_attention`: some rows of the batch, some columns of the weights."""
    (B, Tq, _), Tk, A = inputs["q"].shape, inputs["k"].shape[1], len(inputs["w"])
    weights = ("w_q", "w_k", "w")
    names = [*(f"d{name}" for name in inputs)]

    def of_row(b, take):
        """{tensor: values} of one row of the batch; of the weights, its share."""
        arrays = (take(x if n in weights else x[b : b + 1]) for n, x in inputs.items())
        lengths = options.get("lengths")
        row = {} if lengths is None else {"lengths": lengths[b : b + 1]}
        o, cache = additive_attention(*arrays, **row)
        if dys is None:
            return {"o": o}
        gradients = additive_attention_backward(take(dys["o"][b : b + 1]), cache)
        return {"o": o} | dict(zip(names, gradients))

    def part(b):
        places = {"o": Tq, "dq": Tq, "dk": Tk, "dv": Tk}
        takes = {n: Take(b * T + np.arange(T)) for n, T in places.items() if dys or n == "o"}

        def compute(arithmetic):
            found = of_row(b, taken_in(arithmetic))
            return {name: found[name] for name in takes}

        return Part(takes, compute, runs=runs_for(4 * Tq * Tk * A))

    columns = spread(A, _COLUMNS, rng)

    def summed(arithmetic):
        rows = [of_row(b, taken_in(arithmetic)) for b in range(B)]
        terms = {"w_q": Tq, "w_k": Tk, "w": Tq * Tk}
        return {
            f"d{n}": chained([row[f"d{n}"][..., columns] for row in rows], terms[n])
            for n in weights
        }

    parts = [part(int(b)) for b in spread(B, _GROUPS, rng)]
    if dys is None:
        return parts
    takes = {f"d{n}": Take(np.arange(inputs[n].size // A), columns) for n in weights}
    return [*parts, Part(takes, summed, runs=runs_for(4 * B * Tq * Tk * A))]
