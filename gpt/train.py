"""Training a GPT from scratch on text files."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gaugeblock import kernels

from . import data
from .config import GPTConfig
from .model import GPT, torch_device, torch_dtype, written_aside
from .optimizer import AdamW
from .tokenizer import ByteTokenizer


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long.

    lr climbs linearly over `warmup` steps and falls to `lr_end`·lr along a cosine. Weight decay
    falls on matrices and embeddings, not on biases and norms. clip bounds the global gradient norm.
    checkpoint_every 0 writes none; evaluate_every 0 evaluates at the end only.
    dtype is what activations are computed in; weights and moments stay float32.
    """

    data: tuple[str, ...]
    out: str
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 128
    steps: int = 600
    batch_size: int = 16
    lr: float = 2e-3
    lr_end: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    checkpoint_every: int = 0
    evaluate_every: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    impl: str = "auto"
    resume: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be ≥ 1, got {getattr(self, name)}")
        for name in ("warmup", "checkpoint_every", "evaluate_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: {name} must be ≥ 0, got {getattr(self, name)}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"train: lr must lie in 0 … 1, 0 excluded, got {self.lr}")
        if not self.clip > 0:
            raise ValueError(f"train: clip must be > 0, got {self.clip}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"train: dropout must lie in 0 … 1, 1 excluded, got {self.dropout}")
        if not self.weight_decay >= 0:
            raise ValueError(f"train: weight_decay must be ≥ 0, got {self.weight_decay}")
        torch_device(self.device)
        torch_dtype(self.dtype)


# what a resumed run may be told anew: where and how it runs, not what it learns
_MAY_CHANGE = {"steps", "out", "resume", "device", "impl", "checkpoint_every", "evaluate_every"}


def learning_rate(config, step):
    """Linear warm-up, then a cosine that reaches lr_end·lr where the steps end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer(model, config):
    """AdamW with decay on matrices and embeddings only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        max_norm=config.clip,
        # what has diverged is reported before it has spoiled anything
        skip_nonfinite=True,
        impl=config.impl,
    )


def train(config, report=lambda record: None):
    """Train, and leave a Hugging Face model, its tokenizer and the loss curve in `config.out`.

    `report` is called with each step's record, as written to metrics.jsonl. Returns a summary:
    {"parameters", "loss", "held_out_loss", "unigram_entropy", "seconds", "tokens_per_s", "impl"}.
    Raises ValueError or FileNotFoundError before anything is written; an `out` that already holds
    files is refused unless `resume` is set.
    """
    tokenizer = ByteTokenizer()
    shape = GPTConfig(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        block_size=config.block_size, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    ids = tokenizer.encode(data.read_text(config.data))
    training, held_out = data.split(ids, config.block_size)
    out = Path(config.out)
    _expect_fresh(out, config.resume)

    torch.manual_seed(config.seed)
    model = GPT(shape, config.impl).to(config.device)
    model.compute_dtype, model.dropout = torch_dtype(config.dtype), config.dropout
    impl = kernels.resolve("train", config.impl, model.wte.weight)
    adamw = optimizer(model, config)
    first = _resume(out, model, adamw, config) if config.resume else 0

    out.mkdir(parents=True, exist_ok=True)
    began, records = time.perf_counter(), _kept_records(out / "metrics.jsonl", first)
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log:
        for record in records:
            log.write(json.dumps(record) + "\n")
        for step in range(first, config.steps):
            record = _step(model, adamw, training, config, step)
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0:
                record["held_out_loss"] = evaluate(model, held_out, config.batch_size)
            records.append(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
            # after the log, which then holds every step of a checkpoint
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                _checkpoint(out / "checkpoints" / f"step-{step + 1:06d}", model, adamw, config)
            report(record)
    seconds = time.perf_counter() - began
    summary = {
        "parameters": model.parameter_count(),
        "loss": records[-1]["loss"],
        "held_out_loss": evaluate(model, held_out, config.batch_size),
        "unigram_entropy": data.unigram_entropy(ids),
        "seconds": seconds,
        "tokens_per_s": (config.steps - first) * config.batch_size * config.block_size / seconds,
        "impl": impl,
    }
    with written_aside(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save(aside)
        (aside / "train.json").write_text(
            json.dumps({"config": asdict(config), "summary": summary}, indent=2) + "\n"
        )
        plot_losses(records, summary, aside / "loss.png")
    return summary


def _step(model, adamw, ids, config, step):
    """One optimiser step; its record."""
    began = time.perf_counter()
    rate = learning_rate(config, step)
    for group in adamw.param_groups:
        group["lr"] = rate
    x, y = data.batch(ids, config.block_size, config.batch_size, config.seed, step)
    # a resumed run drops what the whole run would have
    seed = int(np.random.default_rng([config.seed, step]).integers(2**47))
    x, y = x.to(config.device), y.to(config.device)
    _, loss = model(x, y, fused_loss=True, dropout_seed=seed)
    loss.backward()
    adamw.step()
    # asked for after the step, so that the device does not wait for the host to launch it
    loss, norm = loss.item(), adamw.grad_norm.item()
    if not math.isfinite(loss + norm):
        raise ValueError(
            f"train: loss and gradient must stay finite, got {loss} and {norm} at step "
            f"{step + 1}; lower --lr"
        )
    adamw.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def evaluate(model, ids, batch_size):
    """Mean loss in nats a token over all whole windows of a text."""
    device, total, count = model.wte.weight.device, 0.0, 0
    training = model.training
    model.eval()
    for x, y in data.held_out_batches(ids, model.config.block_size, batch_size):
        _, loss = model(x.to(device), y.to(device), fused_loss=True)
        total, count = total + loss.item() * len(x), count + len(x)
    model.train(training)
    return total / count


def plot_losses(records, summary, path):
    """The loss curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], lw=1, label="training")
    held_out = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    held_out.append((records[-1]["step"], summary["held_out_loss"]))
    axes.plot(*zip(*held_out), "o-", ms=4, label="held-out text")
    axes.axhline(summary["unigram_entropy"], color="0.5", ls="--", lw=1, label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _expect_fresh(out, resume):
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: --out must be a directory, {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise ValueError(
            f"train: --out must be empty or new, {out} holds files; choose another, or --resume"
        )


def _checkpoint(directory, model, adamw, config):
    """The model as a Hugging Face directory, with the optimiser's moments beside it."""
    state = adamw.state_dict()["state"]
    tensors = {f"{i}.{name}": t.contiguous() for i, s in state.items() for name, t in s.items()}
    with written_aside(directory) as aside:
        model.save_pretrained(aside)
        save_file(tensors, aside / "optimizer.safetensors")
        (aside / "config.train.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def _resume(out, model, adamw, config):
    """Load the newest checkpoint into model and optimiser; the number of steps already done."""
    # by number: a million has one digit more
    found = sorted((out / "checkpoints").glob("step-*"), key=_steps)
    if not found:
        raise ValueError(f"train: --resume needs a checkpoint, {out} holds none; start without it")
    before = json.loads((found[-1] / "config.train.json").read_text())
    for name, value in asdict(config).items():
        value = list(value) if isinstance(value, tuple) else value
        # a checkpoint from before an option existed has its default
        was = before[name] if name in before else getattr(TrainConfig, name)
        if name not in _MAY_CHANGE and was != value:
            raise ValueError(
                f"train: --resume needs {name} as in {found[-1]}, {was!r}, got {value!r}"
            )
    done = _steps(found[-1])
    if done >= config.steps:
        raise ValueError(f"train: --resume needs steps > {done}, already done, got {config.steps}")
    model.load_state_dict(GPT.from_pretrained(found[-1]).state_dict())
    state = {}
    for key, tensor in load_file(found[-1] / "optimizer.safetensors").items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensor
    adamw.load_state_dict({**adamw.state_dict(), "state": state})
    return done


def _steps(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def _kept_records(path, steps):
    """The records of the first `steps` steps of an interrupted run."""
    if not steps or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:steps]]
