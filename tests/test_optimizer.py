"""The optimiser of training: torch's AdamW and clipping, step for step and file for file."""

import copy
import math
import pickle
import time

import pytest
import torch
from gaugeblock.gpt import AdamW
from gaugeblock.kernels._launch import LAUNCHES

IMPLS = ("triton", "eager")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8)
SHAPES = ((20, 30), (30,), (5, 6, 7), ())


def model(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=draw).to(DEVICE, dtype)) for s in SHAPES]


def groups(params):
    return [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:3], "weight_decay": 0.0, "lr": 0.02},
        {"params": params[3:], "betas": (0.8, 0.9), "eps": 1e-3},
    ]


def torchs(params):
    return torch.optim.AdamW(groups(params), **HYPER)


def ours(params, impl="eager", **options):
    return AdamW(groups(params), **HYPER, impl=impl, **options)


def run(params, optimiser, steps, max_norm=None, absent=()):
    """Steps with the gradients of their numbers, some missing; torch's clipping where asked for."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=draw).to(DEVICE, p.dtype) * step / 4
            p.grad = None if (step, i) in absent else grad
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimiser.step()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_are_torchs(impl):
    a, b = model(), model()
    absent = {(1, 1), (3, 0), (3, 3)}
    run(a, torchs(a), range(1, 6), max_norm=10.0, absent=absent)
    optimiser = ours(b, impl, max_norm=10.0)
    LAUNCHES.clear()
    run(b, optimiser, range(1, 6), absent=absent)
    assert_same(a, b)
    assert LAUNCHES.total() == (3 * 5 if impl == "triton" else 0)
    # clipped, and the gradients not changed
    norm = torch.nn.utils.get_total_norm([p.grad for p in b])
    torch.testing.assert_close(optimiser.grad_norm, norm)
    assert norm > 10
    assert [optimiser.state[p]["step"].item() for p in b] == [4, 4, 5, 4]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("first", ["torch", "ours"])
def test_either_goes_on_where_the_other_stopped(first, impl):
    def make(name, params):
        return torchs(params) if name == "torch" else ours(params, impl)

    second = "ours" if first == "torch" else "torch"
    whole, broken = model(), model()
    run(whole, torchs(whole), range(1, 9))
    before = make(first, broken)
    run(broken, before, range(1, 5))
    saved = copy.deepcopy(before.state_dict())
    after = make(second, broken)
    after.load_state_dict(saved)
    run(broken, after, range(5, 9))
    assert_same(whole, broken)
    # torch itself goes on counting in what it has loaded
    if second == "ours":
        assert all(state["step"] == 4 for state in saved["state"].values())


def test_the_state_has_torchs_names_shapes_and_dtypes():
    a, b = model(), model()
    states = []
    for params, optimiser in ((a, torchs(a)), (b, ours(b))):
        run(params, optimiser, [1])
        state = optimiser.state_dict()["state"]
        states.append(
            {i: {n: (t.shape, t.dtype, t.device) for n, t in s.items()} for i, s in state.items()}
        )
    assert states[0] == states[1]
    assert set(states[0][0]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("impl", IMPLS)
def test_16_bit_parameters_keep_float32_state_through_a_file(impl, tmp_path):
    whole, broken = model(torch.bfloat16), model(torch.bfloat16)
    run(whole, ours(whole, impl), range(1, 7))
    before = ours(broken, impl)
    run(broken, before, range(1, 4))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = ours(broken, impl)
    after.load_state_dict(torch.load(tmp_path / "state.pt"))
    for p in broken:
        for name in ("exp_avg", "exp_avg_sq", "master"):
            old, new = before.state[p][name], after.state[p][name]
            assert new.dtype == torch.float32 and torch.equal(old, new)
            assert old.data_ptr() != new.data_ptr()
    run(broken, after, range(4, 7))
    assert all(map(torch.equal, whole, broken))


def test_torchs_16_bit_state_is_taken():
    params = model(torch.bfloat16)
    theirs = torchs(params)
    run(params, theirs, [1])
    optimiser = ours(params)
    optimiser.load_state_dict(theirs.state_dict())
    run(params, optimiser, [2])
    for p in params:
        state = optimiser.state[p]
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["master"].bfloat16(), p)


def test_copies_and_pickles_go_on():
    whole, params = model(), model()
    run(whole, ours(whole, max_norm=1.0), range(1, 5))
    optimiser = ours(params, max_norm=1.0, skip_nonfinite=True)
    run(params, optimiser, [1, 2])
    params, optimiser = copy.deepcopy((params, optimiser))
    run(params, optimiser, [3])
    params, optimiser = pickle.loads(pickle.dumps((params, optimiser)))
    run(params, optimiser, [4])
    assert_same(whole, params)
    assert optimiser.max_norm == 1.0 and optimiser.skip_nonfinite and optimiser.impl == "eager"
    assert optimiser.grad_norm > 1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_that_is_not_finite_is_skipped_where_asked(impl):
    params = model()
    optimiser = ours(params, impl, max_norm=1.0, skip_nonfinite=True)
    run(params, optimiser, [1])
    kept = copy.deepcopy(params)
    params[1].grad[3] = math.nan
    optimiser.step()
    assert optimiser.grad_norm.isnan()
    assert all(map(torch.equal, kept, params))
    run(params, optimiser, [2])
    assert not any(map(torch.equal, kept, params))
    assert all(p.isfinite().all() for p in params)


def test_schedulers_closures_and_later_groups():
    params = model()
    optimiser = AdamW(params[:2], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    assert optimiser.step() is None
    assert optimiser.grad_norm is None

    def closure():
        optimiser.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimiser.step(closure)
    scheduler.step()
    assert optimiser.param_groups[0]["lr"] == 0.05
    optimiser.add_param_group({"params": params[2:]})
    kept = params[2].detach().clone()
    assert optimiser.step(closure) < first
    assert not torch.equal(params[2], kept)
    assert optimiser.zero_grad() is None and params[0].grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(amsgrad=True), "AdamW: amsgrad must be False, got True; use torch.optim.AdamW"),
        (dict(maximize=True), "AdamW: maximize must be False, got True"),
    ],
)
def test_what_torch_can_do_alone_is_refused(options, message):
    params = model()
    theirs = torch.optim.AdamW(params, **options)
    optimiser = AdamW(params)
    with pytest.raises(ValueError, match=message):
        optimiser.load_state_dict(theirs.state_dict())


def test_adam_whose_decay_is_a_gradient_is_refused():
    params = model()
    saved = torch.optim.Adam(params, weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match="decoupled_weight_decay must be True, got False"):
        AdamW(params).load_state_dict(saved)


def test_sparse_gradients_and_wrong_options_are_refused_and_nothing_changes():
    params = model()
    optimiser = ours(params)
    run(params, optimiser, [1])
    kept = copy.deepcopy(params)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(TypeError, match=r"adamw: g\[0\] must be dense, got torch.sparse_coo"):
        optimiser.step()
    params[0].grad = params[0].grad.to_dense()
    optimiser.param_groups[1]["lr"] = torch.tensor(0.1)
    with pytest.raises(TypeError, match="adamw: lr must be a number on the host"):
        optimiser.step()
    assert all(map(torch.equal, kept, params))
    assert all(state["step"] == 1 for state in optimiser.state.values())


def test_the_twin_is_about_as_fast_as_torchs():
    """A CPU model's step, the best of several: at most twice torch's with its clipping."""
    shapes = [(128, 128)] * 20 + [(128, 512)] * 8 + [(128,)] * 40
    best = {}
    for name, make in (("torch", torch.optim.AdamW), ("ours", AdamW)):
        params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        options = {} if name == "torch" else dict(max_norm=1.0, impl="eager")
        optimiser, times = make(params, **options), []
        for _ in range(12):
            began = time.process_time()
            if name == "torch":
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            times.append(time.process_time() - began)
        best[name] = min(times)
    assert best["ours"] <= 2 * best["torch"], best
