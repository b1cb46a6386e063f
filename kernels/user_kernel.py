"""A user's own `@triton.jit` kernel, found by name and compiled by its signature."""

import ast
import importlib
import os
import re
import sys

import triton.language as tl
from triton.runtime.jit import JITFunction

_TYPES = (
    "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64",
    "fp8e4nv", "fp8e5", "fp8e4b15", "fp8e4b8", "fp8e5b16", "fp16", "bf16", "fp32", "fp64",
)  # fmt: skip
_WORD = re.compile(rf"\*{{0,2}}(?:{'|'.join(_TYPES)})|tensordesc<.+>")
_ASK = "inspect: signature"


class Absent(ValueError):
    """There is no module, or nothing in it, of that name."""


def load(name):
    """(kernel, its autotuner's configurations) of "module:function"; the working folder first.

    Raises ValueError with the reason where there is no such kernel: `Absent` where it is not there.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"inspect: kernel must be module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        kind = Absent if name and f"{module}.".startswith(f"{name}.") else ValueError
        raise kind(f"inspect: {module} must import, it does not: {said}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise Absent(f"inspect: {module} must define {attribute}, it does not")
        found = getattr(found, part)
    return unwrap(found, name)


def unwrap(found, name):
    """(kernel, configurations) of a kernel that autotune or heuristics may have wrapped."""
    kernel, configs = found, []
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):
        configs += getattr(kernel, "configs", [])
        kernel = kernel.fn
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            f"inspect: {name} must be a @triton.jit kernel, got {type(found).__name__}"
        )
    return kernel, [config.all_kwargs() for config in configs]


def variants(kernel, configs, signature, constants, options):
    """[(what to compile, its constants, its launch options)], one for each configuration.

    signature: the types of the parameters that are not constexpr and not in `constants`, in order.
    What is given beats what an autotuner's configuration says.
    """
    found = []
    for config in configs or [{}]:
        tuned = {k: v for k, v in config.items() if k in kernel.arg_names}
        launch = {k: v for k, v in config.items() if k not in tuned} | options
        variant = _constants(kernel, tuned | constants), launch
        if variant not in found:
            found.append(variant)
    return [(_source(kernel, signature, fixed), fixed, launch) for fixed, launch in found]


def _constants(kernel, given):
    """Every constexpr parameter's value, and those of the parameters that the caller fixed."""
    name = kernel.__name__
    for key in given:
        if key not in kernel.arg_names:
            known = ", ".join(kernel.arg_names)
            raise ValueError(
                f"inspect: constexpr must be a parameter of {name} ({known}), got {key}"
            )
    fixed = dict(given)
    for parameter in kernel.params:
        if parameter.is_constexpr and parameter.name not in fixed:
            if not parameter.has_default:
                raise ValueError(
                    f"inspect: {name} needs its constexpr {parameter.name}, got none; "
                    f"give --constexpr {parameter.name}=VALUE"
                )
            fixed[parameter.name] = parameter.default
    return fixed


def _source(kernel, signature, fixed):
    """Triton's description of what to compile. ValueError for a signature that does not fit."""
    names = [name for name in kernel.arg_names if name not in fixed]
    words = [word.strip() for word in re.split(r",(?![^<]*>)", signature) if word.strip()]
    if len(words) != len(names):
        raise ValueError(
            f"{_ASK} must have {len(names)} types ({', '.join(names)}), got {len(words)}"
        )
    types = dict.fromkeys(kernel.arg_names, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    attributes = {}
    for name, word in zip(names, words):
        word, _, hint = word.partition(":")
        if not _WORD.fullmatch(word):
            raise ValueError(
                f"{_ASK} must name {name}'s type, one of {', '.join(_TYPES)}, or a pointer to one "
                f"(*fp16), got {word!r}"
            )
        if hint not in ("", "1", "16"):
            raise ValueError(f"{_ASK} may add :16 (divisible by 16) or :1 to a type, got :{hint}")
        place = (kernel.arg_names.index(name),)
        if hint == "1":
            constants[place] = 1
            continue
        types[name] = word
        if hint == "16":
            attributes[place] = [["tt.divisibility", 16]]
    # set here, to Triton's or to Gluon's
    kernel.create_binder()
    return kernel.ASTSource(kernel, types, constants, attributes)


def explain(error):
    """What a compiler error says, in one line: the innermost cause and the line it points at."""
    place = said = None
    while error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        found = re.match(r"at (\d+):\d+:", lines[0]) if lines else None
        place = found[1] if found else place
        said = lines[-1] if lines else type(error).__name__
        error = error.__cause__
    return f"{said}, line {place} of the function" if place else said


def constant(text):
    """A constexpr as the command line gives it: Python's literals, tl.float32, or a word."""
    if text in ("inf", "-inf", "nan"):
        return float(text)
    if text.startswith("tl.") and isinstance(getattr(tl, text[3:], None), tl.dtype):
        return getattr(tl, text[3:])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
