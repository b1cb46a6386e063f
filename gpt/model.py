"""GPT on the kernels: a decoder whose weights are a Hugging Face directory of GPT-2 or GPT-1.

    h = wte[idx] + wpe[0 … T−1]
    per layer:  h = h + attn(ln_1(h)),   h = h + ffn(ln_2(h))            GPT-2, GPT-3
                h = ln_1(h + attn(h)),   h = ln_2(h + ffn(h))            GPT-1
    logits = ln_f(h) headᵀ,   head = wte where tied;   no ln_f in GPT-1

Source: Radford et al. 2018 and 2019; Brown et al. 2020; the released GPT-2 code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gaugeblock import kernels

from .config import GPTConfig

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# a prompt of more tokens is worth the kernel that shares keys among many queries
_DECODED_TOGETHER = 16


def torch_dtype(dtype):
    """A torch dtype from its name, or as it is. Raises ValueError for other names."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"GPT: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def torch_device(device):
    """The device that a name means; "auto" is cuda where there is one.

    Raises ValueError for a device that is absent or holds no values.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ValueError(
            f"GPT: device must be one that torch can use here, got {device!r}; use cpu"
        ) from None
    return torch.device(device)


@dataclass(frozen=True)
class Run:
    """One pass through the model: which kernels, which cache, and what is dropped.

    Each place that drops has a number of its own, which is added to the seed: a counter would stand
    still where torch.compile meets a hook.
    """

    impl: str
    cache: KVCache | None
    dropout: float
    seed: int

    def drop(self, x, place):
        if not self.dropout:
            return x
        return kernels.dropout(x, self.dropout, self.seed + place, impl=self.impl)


class Affine(nn.Module):
    """x w + b with w (in, out), the way GPT-2's files store it; cast to x's dtype."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def pair(self, dtype):
        return self.weight.to(dtype), self.bias.to(dtype)

    def forward(self, x):
        w, b = self.pair(x.dtype)
        return F.linear(x, w.t(), b)


class LayerNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, h, x, run):
        """The norm of h + x, and that sum; x None adds nothing."""
        w, b = self.weight.to(h.dtype), self.bias.to(h.dtype)
        if x is None:
            return kernels.layer_norm(h, w, b, self.eps, impl=run.impl), h
        return kernels.residual_layer_norm(h, x, w, b, self.eps, impl=run.impl)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer, self.window = config.n_head, layer, config.window(layer)
        self.place = 3 * layer + 2
        self.c_attn = Affine(config.n_embd, 3 * config.n_embd)
        self.c_proj = Affine(config.n_embd, config.n_embd)
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x, run):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        if run.cache is None:
            o = kernels.attention(
                q, k, v, causal=True, scale=self.scale, window=self.window, dropout=run.dropout,
                seed=run.seed + self.place, impl=run.impl,
            )  # fmt: skip
        else:
            o = run.cache.attend(self.layer, q, k, v, self.scale, self.window, run.impl)
        return run.drop(self.c_proj(o.transpose(1, 2).reshape(B, T, C)), self.place + 1)


class MLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Affine(config.n_embd, n_inner)
        self.c_proj = Affine(n_inner, config.n_embd)
        self.activation, self.place = config.activation, 3 * layer + 4

    def forward(self, x, run):
        w1, b1 = self.c_fc.pair(x.dtype)
        w2, b2 = self.c_proj.pair(x.dtype)
        y = kernels.ffn(x, w1, b1, w2, b2, self.activation, impl=run.impl)
        return run.drop(y, self.place)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.eps)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.eps)
        self.mlp = MLP(config, layer)
        self.post_norm = config.post_norm

    def forward(self, h, x, run):
        """The residual stream h, and x, which the next norm adds to it; None with post-LN."""
        if self.post_norm:
            h, _ = self.ln_1(h, self.attn(h, run), run)
            h, _ = self.ln_2(h, self.mlp(h, run), run)
            return h, None
        y, h = self.ln_1(h, x, run)
        y, h = self.ln_2(h, self.attn(y, run), run)
        return h, self.mlp(y, run)


class KVCache:
    """Keys and values of the tokens seen so far, (layer, B, H, block_size, D) each.

    What is attended to through a cache has no gradient.
    """

    def __init__(self, model, batch):
        c, like = model.config, model.wte.weight
        shape = (c.n_layer, batch, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.k = torch.empty(shape, dtype=model.activation_dtype(), device=like.device)
        self.v = torch.empty_like(self.k)
        self.pages = torch.arange(batch, dtype=torch.int32, device=like.device)[:, None]
        self.length = 0

    @torch.no_grad()
    def attend(self, layer, q, k, v, scale, window, impl):
        """Append a layer's keys and values, and attend to all of that layer's so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        k, v = self.k[layer], self.v[layer]
        if q.shape[2] > _DECODED_TOGETHER:
            k, v = k[:, :, :end], v[:, :, :end]
            return kernels.attention(q, k, v, causal=True, scale=scale, window=window, impl=impl)
        # a row's keys are one page; the same shapes at every step
        lengths = torch.full_like(self.pages[:, 0], end)
        return kernels.paged_attention(
            q, k, v, self.pages, lengths, scale=scale, window=window, impl=impl
        )


class GPT(nn.Module):
    """A GPT whose attention, FFN, norms and loss run on the kernels.

    impl:          which kernels: "auto", "triton" or "eager".
    compute_dtype: activations and the weights they meet are cast to it; None keeps the weights'.
                   torch.autocast's dtype goes before it.
    dropout:       the share of embeddings, attention weights and both projections' outputs that is
                   dropped while the model is in training mode.
    dropout_seed:  which ones, 0 … 2⁴⁷: the caller gives each step another, here or to `forward`.
    """

    def __init__(self, config, impl="auto"):
        super().__init__()
        self.config, self.impl, self.compute_dtype = config, impl, None
        self.dropout, self.dropout_seed = 0.0, 0
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        if not config.post_norm:
            self.ln_f = LayerNorm(config.n_embd, config.eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """N(0, 0.02); projections into the residual stream a factor 1/√(2·n_layer) smaller."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                residual = name.endswith("c_proj.weight")
                p.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def activation_dtype(self):
        """The torch dtype of activations, and of the weights where they meet."""
        device = self.wte.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return torch_dtype(self.compute_dtype or self.wte.weight.dtype)

    def forward(
        self, idx, targets=None, attention_mask=None, *, cache=None, fused_loss=False,
        dropout_seed=None,
    ):  # fmt: skip
        """Logits, and the mean cross-entropy where targets are given.

        idx, targets: (B, T) int; targets are already shifted, −100 is ignored.
        attention_mask: (B, T), 0 at padding on either side; positions count the tokens that are
        not padding. Logits at padding are 0 and its targets are ignored.
        fused_loss: the loss comes straight from the head, whose logits are never stored.
        dropout_seed: the model's by default. torch.compile takes an attribute for a constant and
        compiles anew for each seed there; given here, it compiles once.
        Returns (logits (B, T, V), loss or None); (None, loss) with fused_loss.
        Raises ValueError for shapes, ids out of range (on a CPU) or more than block_size tokens.
        """
        self._expect_ids(idx, 0 if cache is None else cache.length)
        if attention_mask is not None and cache is not None:
            raise ValueError("GPT: attention_mask must be None with a cache, got a mask; drop one")
        if cache is not None and cache.k.shape[1] != idx.shape[0]:
            raise ValueError(
                f"GPT: cache must be for idx's rows, {idx.shape[0]}, got one for {cache.k.shape[1]}"
            )
        if fused_loss and targets is None:
            raise ValueError("GPT: fused_loss must have targets, got None; pass them")
        keep, seed = None, self.dropout_seed if dropout_seed is None else dropout_seed
        if attention_mask is None:
            x = self._trunk(idx, seed, cache)
        else:
            keep = self._kept(idx, attention_mask)
            x = self._padded_trunk(idx, seed, keep)
            if targets is not None:
                targets = targets.masked_fill(~keep, -100)
        head = self.wte if self.config.tie_word_embeddings else self.lm_head
        w = head.weight.to(x.dtype)
        if fused_loss:
            return None, kernels.linear_cross_entropy(x, w, targets, impl=self.impl)
        logits = F.linear(x, w)
        if keep is not None:
            logits = logits.masked_fill(~keep[..., None], 0.0)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets, impl=self.impl)

    def _trunk(self, idx, seed, cache=None):
        """What the head reads, (B, T, C)."""
        positions = None
        if cache is not None and cache.length:
            end = cache.length + idx.shape[1]
            positions = torch.arange(cache.length, end, device=idx.device)
        wte, wpe = self.wte.weight, self.wpe.weight
        h = kernels.embedding(idx, wte, wpe, positions, impl=self.impl)
        # whatever seed the caller counts with, the places of two passes have different ones
        run = Run(self.impl, cache, self.dropout if self.training else 0.0, seed << 16)
        h, x = run.drop(h.to(self.activation_dtype()), 1), None
        for block in self.h:
            h, x = block(h, x, run)
        if cache is not None:
            cache.length += idx.shape[1]
        return h if self.config.post_norm else self.ln_f(h, x, run)[0]

    def _padded_trunk(self, idx, seed, keep):
        """Move padding behind the tokens, where causality hides it, and what comes out back."""
        order = keep.long().argsort(dim=1, descending=True, stable=True)
        x = self._trunk(idx.gather(1, order), seed)
        return x.gather(1, order.argsort(dim=1)[..., None].expand_as(x))

    def _kept(self, idx, attention_mask):
        if attention_mask.shape != idx.shape:
            raise ValueError(
                f"GPT: attention_mask must have idx's shape {tuple(idx.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        return attention_mask != 0

    def _expect_ids(self, idx, start):
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"GPT: idx must have shape (B, T) with T ≥ 1, got {tuple(idx.shape)}")
        if idx.is_floating_point() or idx.dtype == torch.bool:
            raise TypeError(f"GPT: idx must be integers, got {idx.dtype}")
        if start + idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: idx must stay within block_size = {self.config.block_size} tokens, "
                f"got {start + idx.shape[1]}; crop it"
            )
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            V = self.config.vocab_size
            wrong = idx[(idx < 0) | (idx >= V)]
            if len(wrong):
                raise ValueError(
                    f"GPT: idx must lie in 0 … vocab_size − 1 = {V - 1}, got {int(wrong[0])}"
                )

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **options):
        """The prompt and `max_new_tokens` more; see `gaugeblock.gpt.generate.generate`."""
        from .generate import generate

        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, **options)

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def from_pretrained(cls, directory, dtype=None, impl="auto"):
        """Read a Hugging Face directory of GPT-2 or GPT-1; `dtype` None keeps the file's.

        Raises FileNotFoundError without config.json or model.safetensors, ValueError for keys or
        shapes that the configuration does not call for.
        """
        directory = Path(directory)
        config = GPTConfig.load(directory / "config.json")
        path = directory / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"model: {directory} must hold model.safetensors, it does not; "
                "give a directory that save_pretrained wrote"
            )
        try:
            weights = _plain_keys(load_file(path), config)
        except SafetensorError as error:
            raise ValueError(f"model.safetensors: must be whole, {path} is not: {error}") from None
        with torch.device("meta"):
            model = cls(config, impl)
        _expect_weights(weights, model.state_dict())
        model.load_state_dict(weights, assign=True)
        model.requires_grad_()
        return model if dtype is None else model.to(torch_dtype(dtype))

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors, which transformers loads.

        The directory is complete or absent: files are written aside and moved into place.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"GPT: directory must be a folder to save to, {directory} is a file")
        config = self.config.to_dict() | {"dtype": str(self.wte.weight.dtype)[len("torch.") :]}
        weights = {
            _file_key(k, self.config): v.detach().contiguous() for k, v in self.state_dict().items()
        }
        with written_aside(directory) as aside:
            (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})


class written_aside:
    """A folder beside `directory` whose files move into it when the block ends without an error."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def __enter__(self):
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.directory.parent))
        return self.aside

    def __exit__(self, error, *_):
        try:
            if error is None and not self.directory.exists():
                self.aside.chmod(0o755)
                self.aside.rename(self.directory)
            elif error is None:
                for path in self.aside.iterdir():
                    os.replace(path, self.directory / path.name)
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)


# what GPT-1's directories call the tables
_TABLES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}


def _file_key(key, config):
    """A parameter's key in the file."""
    if config.post_norm:
        key = _TABLES.get(key, key)
    return key if key.startswith("lm_head") else f"transformer.{key}"


def _plain_keys(weights, config):
    """The parameters of a file by our keys, without stored masks and without a tied head."""
    tables = {theirs: ours for ours, theirs in _TABLES.items()} if config.post_norm else {}
    plain = {}
    for key, value in weights.items():
        key = key.removeprefix("transformer.")
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            plain[tables.get(key, key)] = value
    if config.tie_word_embeddings and "lm_head.weight" in plain:
        # a tied table has two names, of which a file holds one or both
        plain.setdefault("wte.weight", plain.pop("lm_head.weight"))
    return plain


def _expect_weights(weights, wanted):
    for key in wanted:
        if key not in weights:
            raise ValueError(f"model.safetensors: must hold {key!r}, it does not")
    for key, value in weights.items():
        if key not in wanted:
            raise ValueError(f"model.safetensors: must hold GPT's keys only, got {key!r}")
        if value.shape != wanted[key].shape:
            raise ValueError(
                f"model.safetensors: {key} must have shape {tuple(wanted[key].shape)}, "
                f"got {tuple(value.shape)}"
            )
