"""A failure as one file that runs by itself: its data, the call, and the comparison."""

from __future__ import annotations

import base64
import io
import re
import zlib
from pathlib import Path

import numpy as np

from .expectation import Expectation
from .op import Case
from .result import case_id, describe

_SCRIPT = '''"""{title}

Run it: python {file}   (needs numpy and {framework}; exit 1 while it fails)
"""

import base64
import importlib
import io
import sys
import zlib

import numpy as np

CANDIDATE, BACKWARD = {candidate!r}, {backward!r}
DTYPE, DEVICE, LAYOUT = {dtype!r}, {device!r}, {layout!r}
OPTIONS = {options!r}
INPUTS, KEYWORDS = {names!r}, {keywords!r}
GRADIENTS = {gradients!r}
OUTPUT = {output!r}
UPDATES = {updates!r}
# inputs (name), output gradients (dy0, dy1, …), exact values (want) and budget of OUTPUT, as npz
DATA = """
{data}
"""

data = np.load(io.BytesIO(zlib.decompress(base64.b64decode(DATA))))
sys.path.insert(0, ".")


def load(name):
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def call(fn, *first):
    by_position = [x for n, x in inputs.items() if n not in KEYWORDS]
    return fn(*first, *by_position, **{{n: inputs[n] for n in KEYWORDS}}, **options)


{call}

want, budget = data["want"], data["budget"]
print("shape", got.shape, "must be", want.shape)
with np.errstate(invalid="ignore"):
    error = np.abs(got - want)
    fine = (error <= budget) | (got == want) | data["skip"]
    fine |= np.isnan(want).any(-1, keepdims=True) & np.isnan(got).any(-1, keepdims=True)
if fine.all():
    rms, most = float(np.sqrt(np.nanmean(np.square(error)))), float(data["rms"])
    print(f"{{OUTPUT}} is within its budget; RMS error {{rms:.3g}}, budget {{most:.3g}}")
    sys.exit(int(rms > most))
share = np.where(fine, 0, np.nan_to_num(error / np.maximum(budget, 1e-300), nan=np.inf))
at = np.unravel_index(np.argmax(share), want.shape)
place = f"{{OUTPUT}}{{list(map(int, at))}}"
print(f"{{place}} is {{got[at]:.9g}}, must be {{want[at]:.9g}}")
print(f"error {{error[at]:.3g}}, budget {{budget[at]:.3g}}, wrong {{(~fine).sum()}}/{{fine.size}}")
sys.exit(1)
'''

_TORCH = '''import torch

dtype = {"tf32": torch.float32, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(
    DTYPE) or getattr(torch, DTYPE)


def tensor(x, dtype=dtype):
    x = torch.from_numpy(x)
    return (x.to(dtype) if x.is_floating_point() else x).to(DEVICE)


def laid_out(x):
    """The same values with the strides of LAYOUT."""
    if LAYOUT == "bthd" and x.ndim == 4:
        return x.swapaxes(1, 2).contiguous()
    if LAYOUT == "transposed" and x.ndim > 1:
        a, b = (1, 2) if x.ndim > 2 else (0, 1)
        return x.swapaxes(a, b).contiguous().swapaxes(a, b)
    if LAYOUT == "sliced" and x.ndim > 1:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), 0, dtype=x.dtype, device=x.device)
        wide[:] = float("nan") if x.is_floating_point() else 0
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if LAYOUT == "offset":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        view = flat[1:].view(x.shape)
        view.copy_(x)
        return view
    if LAYOUT == "expanded" and x.ndim > 1 and len(x) > 1:
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def turned(x):
    return x.swapaxes(1, 2) if LAYOUT == "bthd" and x.ndim == 4 else x


fixed = {FIXED}
inputs = {
    n: None if n not in data else laid_out(tensor(data[n], fixed.get(n, dtype))) for n in INPUTS
}
options = {
    k: torch.tensor(v, dtype=torch.int32, device=DEVICE) if isinstance(v, tuple) else v
    for k, v in OPTIONS.items()
}
leaves = [inputs[n] for n in GRADIENTS]
for leaf in leaves:
    leaf.requires_grad_(OUTPUT[:1] == "d" and BACKWARD is None)
y = call(load(CANDIDATE))
ys = tuple(inputs[n] for n in UPDATES) if y is None else y if isinstance(y, tuple) else (y,)
if OUTPUT in {OUTPUTS}:
    result = ys[{OUTPUTS}.index(OUTPUT)]
else:
    dys = [turned(torch.from_numpy(data[f"dy{i}"])).to(DEVICE, y.dtype) for i, y in enumerate(ys)]
    if LAYOUT == "broadcast_grad":
        dys = [dy.flatten()[0].expand(dy.shape) for dy in dys]
    if BACKWARD:
        with torch.no_grad():
            grads = call(load(BACKWARD), dys[0] if len(dys) == 1 else dys)
        grads = grads if isinstance(grads, tuple) else (grads,)
    else:
        ways = [(y, dy) for y, dy in zip(ys, dys) if y.requires_grad]
        grads = [None] * len(leaves)
        if ways:
            ys, dys = zip(*ways)
            grads = torch.autograd.grad(ys, leaves, dys, allow_unused=True)
    result = grads[GRADIENTS.index(OUTPUT[1:])]
    result = torch.zeros_like(inputs[OUTPUT[1:]]) if result is None else result
got = turned(result.detach().double().cpu()).numpy()'''

_NUMPY = """import ml_dtypes

dtype = {"tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
         "bfloat16": ml_dtypes.bfloat16}.get(DTYPE) or np.dtype(DTYPE)
fixed = {FIXED}
inputs = {
    n: None if n not in data else data[n].astype(fixed.get(n, dtype))
    if data[n].dtype.kind == "f" else data[n] for n in INPUTS
}
options = {k: np.array(v, np.int32) if isinstance(v, tuple) else v for k, v in OPTIONS.items()}
y = call(load(CANDIDATE))
ys = tuple(inputs[n] for n in UPDATES) if y is None else y if isinstance(y, tuple) else (y,)
if OUTPUT in {OUTPUTS}:
    result = ys[{OUTPUTS}.index(OUTPUT)]
else:
    dys = [data[f"dy{i}"].astype(y.dtype) for i, y in enumerate(ys)]
    grads = call(load(BACKWARD), dys[0] if len(dys) == 1 else tuple(dys))
    grads = grads if isinstance(grads, tuple) else (grads,)
    result = grads[GRADIENTS.index(OUTPUT[1:])]
got = np.asarray(result, np.float64)"""


def write_repro(folder, op, result, candidate, *, framework="torch", device="cpu", backward=None,
                seed=0):  # fmt: skip
    """Write a failure of a torch or NumPy candidate as a file that runs by itself; its path.

    candidate, backward: as "module:function". Where the failure was shrunk, its smallest shape.
    """
    case = next(c for c in op.cases if c.name == result.case)
    if result.smallest:
        case = Case(case.name, tags=case.tags, values=case.values, shapes=case.shapes,
                    keywords=case.keywords, **result.smallest)  # fmt: skip
    expectation = Expectation(op, case, result.dtype, seed, backward is not False)
    content = expectation.content(result.layout)
    output = result.output
    known = [*content.names(0), *(content.names(1) if content.dys is not None else [])]
    if output not in known:
        # a crash, damage or a changed bit: any output shows it
        output = known[0]
    part = 0 if output in content.names(0) else 1
    i = content.names(part).index(output)
    arrays = {n: x if x.dtype.kind in "iub" else x.astype(np.float64)
              for n, x in content.inputs.items() if x is not None}  # fmt: skip
    if content.dys is not None:
        arrays |= {f"dy{i}": dy for i, dy in enumerate(content.dys)}
    if op.accepts:
        want = np.asarray(content.exact[part][i], np.float64)
        arrays |= {"want": want, "budget": 0 * want, "rms": 0.0, "skip": want != want}
    else:
        bound = content.bound(part, i, expectation.precision.results[0])
        arrays |= {
            "want": bound.want,
            "budget": bound.budget.rows,
            "rms": bound.budget.rms,
            "skip": bound.given_up,
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', f'{op.name}-{case_id(result)}')}.py"
    fixed = {n: op.inputs[n].dtype for n in op.floating() if op.inputs[n].dtype}
    prefix = "torch." if framework == "torch" else "np."
    fixed_text = "{" + ", ".join(f"{n!r}: {prefix}{d}" for n, d in fixed.items()) + "}"
    call = (_TORCH if framework == "torch" else _NUMPY).replace("{FIXED}", fixed_text)
    title = describe(result).replace("\\", "/").replace('"""', "'''")
    script = _SCRIPT.format(
        title=title,
        file=path.name,
        framework=framework,
        candidate=candidate,
        backward=backward if isinstance(backward, str) else None,
        dtype=result.dtype,
        device=str(device),
        layout=result.layout,
        options=expectation.options,
        names=op.given(case),
        keywords=list(case.keywords),
        gradients=op.differentiable(content.inputs),
        output=output,
        updates=list(op.updates.values()),
        data=_encoded(arrays),
        call=call.replace("{OUTPUTS}", repr(content.names(0))),
    )
    path.write_text(script)
    return path


def _encoded(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    text = base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode()
    return "\n".join(text[i : i + 100] for i in range(0, len(text), 100))
