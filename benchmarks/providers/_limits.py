"""What several providers cannot do: the reason, or None."""


def forward_only(direction):
    return "has no backward" if direction == "bwd" else None


def sixteen_bits(dtype):
    return None if dtype in ("float16", "bfloat16") else f"takes 16 bits, not {dtype}"


def masked(op, case):
    """Whether some queries of an attention case do not see all keys."""
    options = op.options(case)
    return bool(options.get("causal")) or options.get("window") is not None


def top_left(op, case):
    """The limit of masks that count queries and keys from the first."""
    sizes = op.dims(case)
    other = sizes["Tq"] != sizes["Tk"] and op.options(case).get("align") != "top_left"
    return "aligns masks top-left, where Tq is not Tk" if masked(op, case) and other else None


def bottom_right(op, case):
    """The limit of masks that count queries and keys from the last."""
    sizes = op.dims(case)
    other = sizes["Tq"] != sizes["Tk"] and op.options(case).get("align") == "top_left"
    return "aligns masks bottom-right, where Tq is not Tk" if masked(op, case) and other else None
