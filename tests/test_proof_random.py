"""Random legal shapes, masks and options: definition, gradients, silence, inputs left alone.

And random illegal ones: an error of one line.
"""

import numpy as np
import pytest
from gaugeblock.reference.catalog import CATALOG
from gaugeblock.reference.oracle.op import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import mp

from tests.proof import condition, step
from tests.proof.points import forward, point

bounded = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
small = st.integers(1, 4)
seeds = st.integers(-(2**63), 2**64 - 1)


@st.composite
def masks(draw, B, Tq, Tk):
    """Options of attention that say who sees whom."""
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 5))
        options["global_tokens"] = draw(st.integers(0, 3))
        options["stride"] = draw(st.one_of(st.none(), st.integers(1, 3)))
    if B == 1 and Tq == Tk and draw(st.booleans()):
        ends = draw(st.lists(st.integers(0, Tq), max_size=3))
        options["cu_seqlens"] = (0, *sorted(ends), Tq)
        return options
    options["align"] = draw(st.sampled_from(("bottom_right", "top_left")))
    if draw(st.booleans()):
        options["lengths"] = tuple(draw(st.lists(st.integers(0, Tk), min_size=B, max_size=B)))
    return options


@st.composite
def attention(draw):
    group, Hkv = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dims = dict(B=draw(st.integers(1, 2)), H=group * Hkv, Hkv=Hkv, D=draw(st.integers(1, 3)))
    dims |= dict(Tq=draw(st.integers(1, 5)), Tk=draw(st.integers(1, 5)))
    options = draw(masks(dims["B"], dims["Tq"], dims["Tk"]))
    options["scale"] = draw(st.sampled_from((None, 0.0, -0.7, 2.0)))
    options["dropout"] = draw(st.sampled_from((0.0, 0.3, 0.9)))
    options["seed"] = draw(seeds)
    options["return_lse"] = draw(st.booleans())
    keywords = ()
    if draw(st.booleans()):
        options["score"] = "cosine"
        keywords = draw(st.sampled_from(((), ("temperature",))))
    return dims | options, keywords


@st.composite
def losses(draw):
    options = dict(
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 1.0))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        ignore_index=draw(st.sampled_from((-100, 0, 1))),
    )
    return dict(M=draw(small), V=draw(st.integers(2, 5))) | options, ()


def sizes(*names, keywords=((),), **options):
    """Sizes of 1 … 4, options from strategies."""
    given_keywords = st.sampled_from(keywords)
    values = st.fixed_dictionaries({n: small for n in names} | options)
    return st.tuples(values, given_keywords)


unit = st.floats(0, 1, exclude_max=True)


def optimisers():
    return sizes(
        "M", "N", step=st.integers(1, 10**6), lr=unit, beta1=unit, beta2=st.floats(0, 0.9999),
        eps=st.floats(1e-8, 1), weight_decay=unit,
    )  # fmt: skip


def _with_previous(drawn):
    """P is a dimension only where there are previous tokens."""
    options, keywords = drawn
    return ({k: v for k, v in options.items() if keywords or k != "P"}, keywords)


@st.composite
def additive(draw):
    dims = {n: draw(small) for n in ("B", "Tq", "Tk", "C", "K", "D", "A")}
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, dims["Tk"]), min_size=dims["B"], max_size=dims["B"])
        dims["lengths"] = tuple(draw(lengths))
    return dims, ()


LEGAL = {
    "linear": sizes("M", "K", "N"),
    "embedding": sizes("B", "V", "C", T=st.just(3), P=st.integers(3, 5)),
    "layer_norm": sizes("M", "N", eps=st.sampled_from((1e-5, 0.5, 1e-12))),
    "residual_layer_norm": sizes("M", "N", eps=st.sampled_from((1e-5, 0.5))),
    "attention": attention(),
    "paged_attention": sizes(
        "B", "H", "D", Hkv=st.just(1), Tq=st.integers(1, 2), P=st.integers(1, 4),
        page=st.integers(2, 3), pages=st.integers(1, 2),
        window=st.one_of(st.none(), st.integers(1, 4)), scale=st.sampled_from((None, -0.4)),
    ),
    "ffn": sizes(
        "M", "C", "F", keywords=((), ("residual",)),
        activation=st.sampled_from(("gelu", "gelu_tanh", "relu")),
    ),
    "cross_entropy": losses(),
    "linear_cross_entropy": losses().flatmap(
        lambda drawn: st.integers(1, 3).map(lambda C: (drawn[0] | {"C": C}, drawn[1]))
    ),
    "dropout": sizes("M", "N", p=unit, seed=seeds),
    "additive_attention": additive(),
    "adam": optimisers(),
    "adamw": optimisers(),
    "sample": sizes(
        "M", "V", P=small, keywords=((), ("previous",)),
        temperature=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
        top_k=st.one_of(st.none(), st.integers(1, 5)),
        top_p=st.one_of(st.none(), st.floats(0.05, 1)), min_p=st.one_of(st.none(), unit),
    ).map(_with_previous),
}  # fmt: skip
POSITIVE = {"v": lambda x, dims, rng: x * x}
VALUES = {
    "adam": POSITIVE,
    "sample": {"u": lambda x, dims, rng: rng.random(x.shape)},
    "adamw": POSITIVE,
}


def test_every_op_is_drawn():
    assert set(LEGAL) <= set(CATALOG)


def agrees(p):
    """Outputs against the definition in 30 digits."""
    with mp.workdps(30):
        want = condition.Problem(p)()
    got = np.concatenate([np.ravel(y) for y in p.at()])
    want = np.array([float(v) for v in want])
    # −∞ by definition stands as 0
    assert ((got == want) | np.isfinite(got) | np.isneginf(got)).all()
    held = np.isfinite(got)
    assert (want[~held] == 0).all()
    np.testing.assert_allclose(got[held], want[held], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LEGAL)
def test_no_counterexample(name):
    @bounded
    @given(LEGAL[name], st.integers(0, 2**32))
    def check(drawn, seed):
        (options, keywords), op = drawn, CATALOG[name]
        case = Case(f"random {seed}", keywords=keywords, values=VALUES.get(name), **options)
        p = point(op, case)
        before = {n: np.array(x, copy=True) for n, x in p.inputs.items() if x is not None}
        if "label_smoothing" in options and (p.inputs["targets"] == options["ignore_index"]).all():
            # a mean of nothing is NaN
            return
        agrees(p)
        if p.differentiable():
            error, scale = step.complex_step(p, np.random.default_rng(seed))
            size = sum(np.abs(g).sum() for g in p.gradients())
            assert error <= 1e-12 * (scale + size) + 1e-13
        for n, x in before.items():
            np.testing.assert_array_equal(p.inputs[n], x)

    check()


anything = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=True), st.text(max_size=3), st.none(),
    st.lists(st.integers(-3, 9), max_size=3),
)  # fmt: skip


def refused(call):
    """The error of a call, None where it works."""
    try:
        with np.errstate(all="ignore"):
            call()
    except (ValueError, TypeError) as error:
        return str(error)


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_refused_is_refused_in_one_line(name):
    """An option or a shape may be anything: the call works, or says what is wrong."""
    op = CATALOG[name]

    @bounded
    @given(LEGAL[name], st.data())
    def check(drawn, data):
        options, keywords = drawn
        p = point(op, Case("random", keywords=keywords, values=VALUES.get(name), **options))
        inputs, changed = dict(p.inputs), dict(p.options)
        if changed and data.draw(st.booleans()):
            changed[data.draw(st.sampled_from(sorted(changed)))] = data.draw(anything)
        else:
            which = data.draw(st.sampled_from(sorted(inputs)))
            shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
            inputs[which] = np.resize(inputs[which], shape)
        said = refused(lambda: forward(op)(*inputs.values(), **changed))
        assert said is None or (said and "\n" not in said)

    check()
