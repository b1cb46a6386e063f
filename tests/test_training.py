"""Training learns, repeats, resumes, and leaves whole directories or none."""

import json
import shutil

import numpy as np
import pytest
import torch
from gaugeblock.gpt import GPT, GPTConfig, TrainConfig, data
from gaugeblock.gpt import train as gpt_train
from gaugeblock.gpt.train import learning_rate, optimizer, train
from PIL import Image

from tests.helpers import gaugeblock, python

SMALL = dict(
    n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, lr=3e-2, warmup=2, impl="eager"
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 200)
    return path


def config(text, out, **options):
    return TrainConfig(data=(str(text),), out=str(out), **{**SMALL, **options})


def test_training_learns_and_leaves_a_model(text, tmp_path):
    seen = []
    summary = train(
        config(text, tmp_path / "out", steps=300, evaluate_every=100, lr=1e-2, n_embd=32),
        seen.append,
    )
    assert summary["held_out_loss"] < 0.2 * summary["unigram_entropy"]
    assert [r["step"] for r in seen] == list(range(1, 301))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen
    assert [r["step"] for r in seen if "held_out_loss" in r] == [100, 200, 300]
    assert seen[-1]["held_out_loss"] == pytest.approx(summary["held_out_loss"], rel=1e-6)
    with Image.open(tmp_path / "out" / "loss.png") as picture:
        assert picture.size[0] > 500
    model = GPT.from_pretrained(tmp_path / "out")
    assert model.parameter_count() == summary["parameters"]
    said = gaugeblock(
        "generate", "--model", tmp_path / "out", "--prompt", "the cat", "--max-new-tokens", "40",
        "--temperature", "0",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("the cat sat on the mat. the cat")


def test_the_seed_decides_everything(text, tmp_path):
    losses = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(config(text, tmp_path / name, steps=5, seed=seed))
        records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(r)["loss"] for r in records]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


def test_a_resumed_run_is_the_unbroken_run(text, tmp_path):
    whole = config(text, tmp_path / "whole", steps=12, checkpoint_every=4, dropout=0.1)
    train(whole)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise Stop

    broken = config(text, tmp_path / "broken", steps=12, checkpoint_every=4, dropout=0.1)
    with pytest.raises(Stop):
        train(broken, stop)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="must be empty or new"):
        train(broken)
    train(config(text, tmp_path / "broken", steps=12, checkpoint_every=4, dropout=0.1, resume=True))
    a, b = (GPT.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")
    ]
    assert [json.loads(r)["loss"] for r in logs[0]] == [json.loads(r)["loss"] for r in logs[1]]


def test_a_run_killed_in_a_checkpoint_keeps_its_log_whole(text, tmp_path, monkeypatch):
    checkpoint = gpt_train._checkpoint

    def killed(*arguments):
        checkpoint(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt_train, "_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(text, tmp_path / "out", steps=4, checkpoint_every=2))
    monkeypatch.undo()
    train(config(text, tmp_path / "out", steps=4, resume=True))
    log = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]


def test_the_newest_checkpoint_is_that_of_the_most_steps(text, tmp_path):
    out = tmp_path / "out"
    train(config(text, out, steps=2, checkpoint_every=2))
    checkpoints = out / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-999999")
    (checkpoints / "step-000002").rename(checkpoints / "step-1000000")
    with pytest.raises(ValueError, match="needs steps > 1000000, already done, got 1000000"):
        train(config(text, out, steps=10**6, resume=True))


def test_resume_needs_a_checkpoint_of_the_same_model(text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--resume needs a checkpoint"):
        train(config(text, out, steps=2, resume=True))
    assert not out.exists()
    train(config(text, out, steps=2, checkpoint_every=2))
    for changed, message in (
        (dict(n_embd=32), "--resume needs n_embd as in .*, 16, got 32"),
        (dict(seed=5), "--resume needs seed as in .*, 0, got 5"),
        (dict(steps=2), "--resume needs steps > 2, already done, got 2"),
    ):
        options = dict(steps=4, checkpoint_every=2, resume=True) | changed
        with pytest.raises(ValueError, match=message):
            train(config(text, out, **options))


def test_a_run_that_diverges_stops_before_it_spoils_the_weights(text, tmp_path, monkeypatch):
    backward, seen = torch.Tensor.backward, []

    def diverges(loss):
        backward(loss)
        seen.append(loss)
        if len(seen) == 3:
            held["model"].wte.weight.grad[0, 0] = float("nan")
            held["before"] = [p.detach().clone() for p in held["model"].parameters()]

    held, step = {}, gpt_train._step

    def kept(model, *rest):
        held["model"] = model
        return step(model, *rest)

    monkeypatch.setattr(torch.Tensor, "backward", diverges)
    monkeypatch.setattr(gpt_train, "_step", kept)
    with pytest.raises(ValueError, match=r"must stay finite, got [\d.]+ and nan at step 3"):
        train(config(text, tmp_path / "out", steps=9, checkpoint_every=1))
    assert all(map(torch.equal, held["before"], held["model"].parameters()))
    saved = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved == ["step-000001", "step-000002"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_text_of_one_letter_trains(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 2000)
    ran = gaugeblock("train", "--data", "a.txt", "--out", "out", *GOOD, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_the_learning_rate_climbs_and_falls():
    c = TrainConfig(data=(), out="", lr=1.0, warmup=4, steps=104, lr_end=0.1)
    assert [learning_rate(c, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(c, 4) == 1.0
    assert learning_rate(c, 54) == pytest.approx(0.55)
    assert learning_rate(c, 104) == pytest.approx(0.1)


def test_a_step_has_its_own_rate_and_mask_and_evaluation_drops_nothing(text, tmp_path, monkeypatch):
    forward, step, passes, rates = GPT.forward, gpt_train.AdamW.step, [], []

    def spied_forward(model, *args, **options):
        passes.append((model.training, options.get("dropout_seed")))
        return forward(model, *args, **options)

    def spied_step(adamw):
        assert adamw.max_norm == 0.5
        rates.append({group["lr"] for group in adamw.param_groups})
        return step(adamw)

    monkeypatch.setattr(GPT, "forward", spied_forward)
    monkeypatch.setattr(gpt_train.AdamW, "step", spied_step)
    options = dict(steps=4, dropout=0.5, clip=0.5, evaluate_every=2)
    chosen = config(text, tmp_path / "out", **options)
    train(chosen)
    assert rates == [{learning_rate(chosen, s)} for s in range(4)]
    seeds = [seed for training, seed in passes if training]
    assert len(seeds) == len(set(seeds)) == 4
    assert len(passes) > 4 and {seed for training, seed in passes if not training} == {None}


def test_biases_and_norms_do_not_decay(text, tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16))
    decayed, free = optimizer(model, config(text, tmp_path)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] > 0
    assert free["weight_decay"] == 0
    assert {names[id(p)] for p in free["params"]} == {
        n for n in names.values() if n.endswith("bias") or "ln_" in n
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=1, n_embd=128, block_size=8, vocab_size=256))
    assert model.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[0].mlp.c_proj.bias.abs().max() == 0


def test_batches_are_windows_and_their_successors():
    ids = np.arange(100)
    x, y = data.batch(ids, 8, 5, seed=1, step=3)
    assert torch.equal(x + 1, y)
    assert x.shape == (5, 8)
    assert not torch.equal(x, data.batch(ids, 8, 5, seed=1, step=4)[0])
    starts = {int(data.batch(np.arange(10), 8, 1, seed=0, step=s)[0][0, 0]) for s in range(50)}
    assert starts == {0, 1}


def test_the_held_out_tenth_is_never_trained_on():
    training, held_out = data.split(np.arange(1000), block_size=8)
    assert len(held_out) == 100
    assert training.max() < held_out.min()
    windows = data.held_out_batches(held_out, 8, batch_size=5)
    x, y = (torch.cat(part) for part in zip(*windows))
    assert torch.equal(x.flatten(), torch.arange(900, 996))
    assert torch.equal(y, x + 1)


def test_unigram_entropy_of_known_frequencies():
    assert data.unigram_entropy(np.array([0, 1, 2, 3])) == pytest.approx(np.log(4))
    assert data.unigram_entropy(np.array([5, 5, 5])) == 0


GOOD = ("--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--steps", "2")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, (), "must be a text file, there is none"),
        (b"", (), "must hold text, it is empty"),
        (b" \n\n ", (), "must hold text, it is empty"),
        (b"abc\xff\xfe" * 100, (), "must be UTF-8 text, byte 3 is not"),
        (b"too short", (), "text must be longer than block_size"),
        (b"a b c " * 100, ("--n-head", "3"), "n_head must divide n_embd = 8, got 3"),
        (b"a b c " * 100, ("--steps", "0"), "steps must be ≥ 1, got 0"),
        (b"a b c " * 100, ("--lr", "0"), "lr must lie in 0 … 1"),
        (
            b"a b c " * 100,
            ("--device", "cuda"),
            "device must be one that torch can use here, got 'cuda'",
        ),
        (b"a b c " * 100, ("--device", "tpu"), "device must be one that torch can use here"),
        (b"a b c " * 100, ("--clip", "-1"), "clip must be > 0, got -1"),
        (b"a b c " * 100, ("--weight-decay", "-1"), "weight_decay must be ≥ 0, got -1"),
        (b"a b c " * 100, ("--dtype", "int8"), "dtype must be one of"),
        (b"a b c " * 100, ("--impl", "triton"), "impl='triton' needs a CUDA tensor"),
        (b"a b c " * 100, ("--checkpoint-each", "3"), "--checkpoint-each"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path, content, arguments, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    before = set(tmp_path.iterdir())
    ran = gaugeblock(
        "train", "--data", "text.txt", "--out", "deep/out", *GOOD, *arguments, cwd=tmp_path
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert set(tmp_path.iterdir()) == before


def test_several_files_follow_one_flag(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} word " * 100)
    ran = gaugeblock("train", "--data", "a.txt", "b.txt", "--out", "out", *GOOD, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    saved = json.loads((tmp_path / "out" / "train.json").read_text())
    assert saved["config"]["data"] == ["a.txt", "b.txt"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "metrics.jsonl", "loss.png", "train.json",
    }  # fmt: skip


def test_an_internal_error_is_told_apart():
    ran = python(
        "-c",
        "import gaugeblock.gpt.train as t, sys\n"
        "t.train = lambda *a: {}['bug']\n"
        "from gaugeblock.__main__ import main\n"
        "main(['train', '--data', 'x', '--out', 'y', '--device', 'cpu'])\n",
    )
    assert ran.returncode == 3
    assert "KeyError" in ran.stderr
