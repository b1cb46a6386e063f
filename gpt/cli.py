"""`gaugeblock train | generate`."""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def train(
    data: list[Path] = typer.Option(..., help="UTF-8 text files."),
    more: list[Path] = typer.Argument(None, help="More text files, as in --data a.txt b.txt."),
    out: Path = typer.Option(..., help="A new folder for the model, the log and the loss curve."),
    n_layer: int = typer.Option(4, help="Layers."),
    n_head: int = typer.Option(4, help="Attention heads."),
    n_embd: int = typer.Option(128, help="Width."),
    block_size: int = typer.Option(128, help="Context in tokens (bytes of text)."),
    steps: int = typer.Option(600, help="Optimiser steps."),
    batch_size: int = typer.Option(16, help="Sequences a step."),
    lr: float = typer.Option(2e-3, help="Learning rate at the end of the warm-up."),
    warmup: int = typer.Option(20, help="Steps of linear warm-up; a cosine follows."),
    weight_decay: float = typer.Option(0.1, help="AdamW's decay of matrices and embeddings."),
    clip: float = typer.Option(1.0, help="Largest global gradient norm."),
    dropout: float = typer.Option(0.0, help="Share of activations dropped while training."),
    seed: int = typer.Option(0, help="Seed of the weights and of the batches."),
    checkpoint_every: int = typer.Option(0, help="Steps between checkpoints; 0 for none."),
    evaluate_every: int = typer.Option(0, help="Steps between held-out losses; 0: at the end."),
    device: str = typer.Option("auto", help="cpu, cuda, or auto."),
    dtype: str = typer.Option("auto", help="Of activations; auto: bfloat16 on a GPU."),
    impl: str = typer.Option("auto", help="triton, eager, or auto: triton on a GPU."),
    resume: bool = typer.Option(False, help="Go on from the newest checkpoint in --out."),
):
    """Train a GPT on the bytes of text files.

    The last tenth of the text is held out. --out becomes a Hugging Face model directory with
    metrics.jsonl, loss.png and train.json beside the weights.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from .model import torch_device
    from .train import TrainConfig
    from .train import train as run

    device = torch_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    config = TrainConfig(
        data=tuple(str(path) for path in (*data, *(more or ()))), out=str(out), n_layer=n_layer,
        n_head=n_head, n_embd=n_embd, block_size=block_size, steps=steps, batch_size=batch_size,
        lr=lr, warmup=warmup, weight_decay=weight_decay, clip=clip, dropout=dropout, seed=seed,
        checkpoint_every=checkpoint_every, evaluate_every=evaluate_every, device=str(device),
        dtype=dtype, impl=impl, resume=resume,
    )  # fmt: skip
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        summary = run(
            config,
            lambda record: progress.update(task, completed=record["step"], loss=record["loss"]),
        )
    print(
        f"{summary['parameters']:,} parameters on {device}, {summary['impl']} kernels, {dtype}: "
        f"{summary['seconds']:.1f} s, {summary['tokens_per_s']:,.0f} tokens/s"
    )
    print(
        f"held-out loss {summary['held_out_loss']:.3f} nats a token; "
        f"the unigram entropy of the text is {summary['unigram_entropy']:.3f}"
    )
    print(f"model, metrics.jsonl, train.json and loss.png are in {out}")


@app.command()
def generate(
    model: Path = typer.Option(..., help="A Hugging Face GPT-2 directory with tokenizer.json."),
    prompt: str = typer.Option(..., help="The text to go on from."),
    max_new_tokens: int = typer.Option(200, help="Tokens to generate."),
    temperature: float = typer.Option(0.8, help="0 is greedy."),
    top_k: int = typer.Option(None, help="Keep the k likeliest tokens."),
    top_p: float = typer.Option(None, help="Keep the likeliest tokens up to this probability."),
    seed: int = typer.Option(0, help="Seed of the draw."),
    device: str = typer.Option("auto", help="cpu, cuda, or auto."),
    impl: str = typer.Option("auto", help="triton, eager, or auto: triton on a GPU."),
):
    """Go on from a prompt. Past the context, generation goes on from its last half."""
    import torch

    from .model import GPT, torch_device
    from .tokenizer import load_tokenizer

    device = torch_device(device)
    gpt = GPT.from_pretrained(model, impl=impl).to(device)
    tokenizer = load_tokenizer(model)
    ids = torch.from_numpy(tokenizer.encode(prompt))[None].to(device)
    if ids.shape[1] == 0:
        raise ValueError("generate: prompt must hold at least one token, got ''")
    ids = gpt.generate(ids, max_new_tokens, temperature, top_k, top_p, seed=seed, slide=True)
    print(tokenizer.decode(ids[0]))
