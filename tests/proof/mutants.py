"""Would the proofs see a wrong reference? `python -m tests.proof --mutants`

Every function of an op's module, but those that check arguments, is changed in one place at a time:

    a sign or an operator another one, a term or a factor dropped, in place too
    a transposition dropped, an axis another one
    sum another reduction, a function another one (max, exp, where's branches)
    a constant off by one or doubled, a comparison with or without its equality
    an argument of a call, a keyword option, a subscript's bound changed

The changed module runs the op's cheap proof: a few of the catalog's cases against torch, the
adversarial ones against the exact results, and the alternatives that kernels may take against
float64. A mutant that no proof sees survives; `EQUIVALENT` says why it may.
"""

from __future__ import annotations

import ast
import copy
import importlib
import math
import re
import types
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
from gaugeblock.reference._rounding import Arithmetic
from gaugeblock.reference.catalog import CATALOG
from mpmath import mp

from gaugeblock import reference

from . import adversarial, condition, independent
from .points import Point, catalog_points, point

_FOLDER = Path(reference.__file__).parent
_BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult, ast.MatMult: None,
}  # fmt: skip
_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_NAMES = {
    "sum": "mean", "mean": "sum", "max": "min", "maximum": "minimum", "exp": "expm1",
    "argmax": "argmin", "log1p": "log", "log": "log1p", "any": "all", "erfc": "erf", "sqrt": "abs",
    "cumsum": "cumprod",
}  # fmt: skip
_SKIPPED = ("_check", "_expect", "expect_")
# one term of which the other is the whole
_HALVES = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitAnd, ast.BitOr)


_BOUNDARY = "within a rounding of a boundary either is right"
_PAGE = r"^0 -> 1 in np.where|^1 -> 2 in np.shape"
_NO_MEANING = "a default without a meaning of its own: no window, no dropout"
_FINITE = "any finite number does in place of what nobody reads"
_ELSEWHERE = "oracle.sampled alone calls it; test_sampled compares it with the whole"
_UNSPECIFIED = "a row without a finite logit is unspecified, or its loss NaN in any way"
_ROUNDING = "moves the result by less than its inputs' roundings do"
_SILENCED = "a warning that these cases do not raise; test_reference_ops and the parity cases do"
# (op, function, pattern of the change, why it may survive)
EQUIVALENT = [
    (".*", ".*", r"^1 -> 2 in .*reshape", "−1 became −2: any negative size is the rest"),
    (".*", ".*", r"errstate", _SILENCED),
    ("layer_norm", "layer_norm", r"centred", _ROUNDING),
    ("residual_layer_norm", "residual_layer_norm", r"stored\(h\)", "h − h is 0 in float64"),
    ("adamw|adam", ".*", r"full_like", "a shape that broadcasts to the same"),
    ("cross_entropy", "cross_entropy", r"^0 -> 1 in", "any class does where the target is ignored"),
    ("cross_entropy", "row_losses", r"m == -np.inf|^0\.0 -> 1\.0|^-np.inf -> np.inf", _UNSPECIFIED),
    ("cross_entropy", "row_losses", r"if alpha else 0.0", "multiplied by α = 0"),
    ("sample", "sample", r"u (>=|<)|^[01] -> ", "checks an argument; test_errors"),
    ("sample", "cumulative", r"s > -np.inf|kept & ", "what has probability 0 is never drawn"),
    ("sample", "cumulative", r"top_p <", "top_p = 1 keeps everything either way"),
    ("sample", "cumulative", r"argsort", "short rows are sorted by insertion, which is stable"),
    ("sample", "cumulative", r"> 1 - top_p|p >= min_p \* most", _BOUNDARY),
    ("sample", "distribution", r"total /", "p adds up to 1 but for rounding; test_reference_ops"),
    ("paged_attention", "paged_attention", _PAGE, "any page does where none is used"),
    ("paged_attention", "paged_attention", r"capacity", "checks an argument; test_errors"),
    ("sample", "penalised", r"full_like", "a shape that broadcasts to the same"),
    ("sample", "penalised", r"logits > 0", "0 stays 0"),
    ("sample", "penalised", r"V \+ 1", "one column more that nobody reads"),
    ("sample", "cumulative", r"^1 -> 2$", "top_p = 1 keeps everything either way"),
    ("dropout", "drop", r"^1 -> 2", "what everything is divided by where nothing is kept"),
    ("additive_attention", ".*", r"^0\.0 -> 1\.0", _FINITE),
    ("additive_attention", "additive_attention", r"np.where\(sees, stored", "p is 0 in such a row"),
    ("embedding", "_rows", r"place.reshape", "NumPy 2.1 and newer give that shape already"),
    ("attention", "key_gradients", r".*", _ELSEWHERE),
    ("attention", "visible_keys", r"is None else", _ELSEWHERE),
    ("attention", "visible_keys|attention", r"^0 -> 1", _NO_MEANING),
    ("attention", ".*", r"^(0\.0 -> 1\.0|1\.0 -> 2\.0|-np\.inf -> np\.inf)", _FINITE),
    ("attention", ".*", r"^-?[12] -> [1234] in", "the same axis of four"),
    ("attention", "attend", r"np.where\(sees", "p is 0 in such a row"),
    ("attention", ".*", r"np.where\(sees, lse, 0.0\) -> lse", "p is 0 in such a row"),
    ("attention", "attention", r"^1 -> 2$", "what everything is divided by where nothing is kept"),
    ("attention", "masked_softmax", r"initial", "Tk is at least 1"),
    ("attention", "masked_softmax", r"where=~hidden", "exp(−∞) is 0 either way, slowly"),
    ("ffn", "_by_pieces", r"start", "for more than a piece; test_reference_ops"),
    ("cross_entropy", "row_losses", r"0\.0 \* one", "it is 1, or NaN, which test_rules looks at"),
    ("cross_entropy", "row_losses", r"^m \+ log", _ELSEWHERE),
    ("attention", "_for_heads|_over_groups", r" if ", "saves a copy"),
]  # fmt: skip


def reason(op, function, what):
    """Why a survivor is as right as the reference; None where nobody knows."""
    for ops, functions, pattern, why in EQUIVALENT:
        if re.fullmatch(ops, op) and re.fullmatch(functions, function) and re.search(pattern, what):
            return why
    return None


def measured(op):
    """{"of", "caught", "survivors": [{function, change, reason}]} of an op's mutants."""
    survivors, found = [], mutants(op)
    for function, what, source in found:
        if seen(op, source) is None:
            why = reason(op, function, what)
            survivors.append({"function": function, "change": what, "reason": why})
    return {"of": len(found), "caught": len(found) - len(survivors), "survivors": survivors}


def mutants(op):
    """[(function, what was changed, source of the module)] of an op's module."""
    body = ast.parse(source_of(op)).body
    texts = [ast.unparse(part) for part in body]
    found = []
    for i, function in enumerate(body):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith(_SKIPPED):
            continue
        left_out = {
            id(n) for check in ast.walk(function) if _refuses(check) for n in ast.walk(check)
        }
        for place, node in enumerate(ast.walk(function)):
            if id(node) in left_out:
                continue
            for changed in _changes(node):
                mutant = [*texts[:i], _mutant(function, place, changed), *texts[i + 1 :]]
                found.append((function.name, _what(function, node, changed), "\n".join(mutant)))
    return found


def source_of(op):
    return (_FOLDER / f"_{op}.py").read_text()


def _refuses(node):
    """Whether a statement only checks arguments: its own tests are among those of errors."""
    if isinstance(node, ast.If):
        return not node.orelse and all(map(_refuses, node.body))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", "").startswith(_SKIPPED)
    return isinstance(node, ast.Raise)


def _mutant(function, place, changed):
    """The text of a function with another node in that place."""
    own = copy.deepcopy(function)
    target = list(ast.walk(own))[place]
    # changed in place of the node, whatever holds it
    for parent in ast.walk(own):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, changed)
            elif isinstance(value, list):
                setattr(parent, name, [changed if v is target else v for v in value])
    return ast.unparse(ast.fix_missing_locations(own))


def _what(function, node, changed):
    """What was changed, and in which call where that says more."""
    what = f"{_short(node)} -> {_short(changed)}"
    if isinstance(node, (ast.Constant, ast.UnaryOp)):
        calls = [n for n in ast.walk(function) if isinstance(n, (ast.Call, ast.Subscript))]
        around = [n for n in calls if node in ast.walk(n)]
        what += f" in {_short(around[-1])}" if around else ""
    return what


def _short(node):
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}…"


def _changes(node):
    """The nodes that may stand in place of one."""
    if isinstance(node, ast.BinOp):
        other = _BINARY.get(type(node.op))
        if other:
            yield ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, _HALVES):
            yield node.left
            yield node.right
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if other := _BINARY.get(type(node.op)):
            yield ast.AugAssign(node.target, other(), node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _COMPARED.get(type(node.ops[0]))
        if other:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield ast.Constant(node.value * 2)
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node)
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def _changed_calls(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else None
    if name is None:
        return
    if name in _NAMES:
        func = ast.Attribute(call.func.value, _NAMES[name], call.func.ctx)
        yield ast.Call(func, call.args, call.keywords)
    if name in ("swapaxes", "reshape", "astype"):
        yield call.func.value
    if name == "where":
        yield call.args[1]
        yield call.args[2]
        yield ast.Call(call.func, [call.args[0], call.args[2], call.args[1]], [])
    for i, keyword in enumerate(call.keywords):
        if keyword.arg not in (None, "keepdims", "dtype", "out"):
            yield ast.Call(call.func, call.args, [*call.keywords[:i], *call.keywords[i + 1 :]])


def loaded(op, source):
    """The module of an op from changed source, beside the real one."""
    module = types.ModuleType(f"gaugeblock.reference._{op}")
    module.__package__ = "gaugeblock.reference"
    exec(compile(source, f"mutant of _{op}.py", "exec"), module.__dict__)
    return module


class _Always(Arithmetic):
    """The arithmetic that takes every alternative formula, and is otherwise near to float32."""

    def takes_another(self):
        return True


@cache
def proof(op):
    """[(point, [(what, wanted, tolerance)])] of an op, of the reference as it is."""
    found = []
    row, seen = CATALOG[op], set()
    cases = [case for other, case in catalog_points() if other.name == op and _cheap(row, case)]
    for case in cases:
        p = point(row, case)
        # cases that differ in sizes alone say the same
        kind = (frozenset(row.options(case).items()), *sorted(case.values), len(case.shapes))
        kind = kind if row.options(case) or case.values else (*kind, len(seen))
        if kind in seen or not independent.covers("torch", row, case):
            continue
        seen.add(kind)
        _, pairs = independent.worst("torch", p)
        terms = max([np.abs(x[np.isfinite(x)]).max(initial=0) for _, _, x in pairs])
        found.append((p, [(x, 1e-11 * np.abs(x) + 1e-11 * terms) for _, _, x in pairs]))
    for case in adversarial.cases(row):
        p = point(row, case)
        with mp.workdps(condition.DIGITS):
            found.append((p, condition.wanted(p)))
    return found


def _cheap(row, case):
    sizes = row.dims(case)
    shapes = [row.shape(row.spec(case, name), sizes) for name in row.given(case)]
    return 0 not in sizes.values() and sum(map(math.prod, shapes)) <= 20_000


def seen(op, source):
    """What sees a mutant: "exact", "legal" or an exception's name; None where it survives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module = loaded(op, source)
            with _in_place(op, module):
                return next((how for how in _checks(op) if how), None)
    except Exception as error:
        return type(error).__name__


def _in_place(op, module):
    """While it lasts, the op's functions are the mutant's."""
    real = importlib.import_module(f"gaugeblock.reference._{op}")
    own = {k: v for k, v in vars(module).items() if callable(v) and hasattr(real, k)}
    own = {k: v for k, v in own.items() if getattr(v, "__module__", "") == module.__name__}
    return patch.multiple(real, **own)


def _checks(op):
    for given, wants in proof(op):
        # a mutant may write into its inputs, and the next one must not find it
        p = replace(given, inputs=copy.deepcopy(given.inputs), dys=copy.deepcopy(given.dys))
        got = [*p.at(), *(p.gradients() if p.differentiable() else ())]
        if len(got) != len(wants):
            yield "count"
        for a, (want, room) in zip(got, wants):
            if np.shape(a) != np.shape(want):
                yield "shape"
            finite = np.isfinite(want)
            if not np.array_equal(np.isfinite(a), finite):
                yield "nonfinite"
            if not (np.abs(a[finite] - want[finite]) <= room[finite]).all():
                yield "exact"
        if not _same(p, given):
            yield "inputs"
    for p, wants in proof(op):
        if p.case.name in (
            "normal",
            "rank_three",
            "residual",
            "smoothed",
            "grouped",
            "cosines",
            "dropout",
            "gelu_middle",
        ):
            yield _legal(p, wants)


_FLOAT32 = np.dtype(np.float32)


def _same(p, drawn):
    """Whether the inputs and output gradients are still what they were drawn as."""
    pairs = [*zip(p.inputs.values(), drawn.inputs.values()), *zip(p.dys, drawn.dys)]
    return all(x is y or np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def _legal(p, wants):
    """Whether the formulas that kernels may take give the same within float32."""
    arithmetics = _Always(_FLOAT32, chunk=1, noise=False), Arithmetic(_FLOAT32, roads=True)
    for arithmetic in arithmetics:
        inputs = {n: arithmetic.array(x) if n in p.floating() else x for n, x in p.inputs.items()}
        dys = tuple(map(arithmetic.array, p.dys))
        under = Point(p.op, p.case, inputs, p.options, dys)
        got = [*under.at(), *(under.gradients() if p.differentiable() else ())]
        largest = max(np.abs(want[np.isfinite(want)]).max(initial=0) for want, _ in wants)
        for a, (want, _) in zip(got, wants):
            finite = np.isfinite(want)
            room = 1e-3 * np.abs(want[finite]).max(initial=0) + 1e-6 * largest
            if not (np.abs(np.asarray(a, float) - want)[finite] <= room).all():
                return "legal"
    return None
