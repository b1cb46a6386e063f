"""Which tensors go together, the tables that say where they are, and the launches."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .. import _configurations
from .._launch import launch, tl_accumulator
from .update import (
    SQUARES_PROGRAMS,
    _adamw_kernel,
    _adamw_list_kernel,
    _adamw_norm_kernel,
    _adamw_squares_kernel,
    _adamw_squares_list_kernel,
)

_TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@functools.lru_cache(maxsize=64)
def coefficients(step, lr, beta1, beta2, eps, weight_decay):
    """decay, rate1, beta2, rate2, length, root, eps of

    m += rate1 (g − m),  v = beta2 v + rate2 g²,  p = decay p − length m/(√v root + eps).

    In float64: 1 − βᵗ of a β near 1 would keep few digits in float32.
    """
    length = lr / _corrected(beta1, step)
    root = 1 / math.sqrt(_corrected(beta2, step))
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, length, root, eps


def _corrected(beta, step):
    return -math.expm1(step * math.log(beta)) if beta else 1.0


class Tables(NamedTuple):
    """What the kernels of a list read on the device."""

    tensors: Any  # (tensors, 6)
    update_chunks: Any  # (chunks, 2)
    squares_chunks: Any
    coefficients: Any  # (tensors, 7)


class Batch(NamedTuple):
    """Tensors of the same dtypes, all of them or none at addresses of 16 bytes."""

    tensors: list  # (p, g, m, v, master or None) of each
    coefficients: list
    aligned: bool

    @property
    def sizes(self):
        return tuple(tensors[0].numel() for tensors in self.tensors)

    def configuration(self, kernel):
        """Launch options of "update" or "squares"."""
        _, g, m, *_ = self.tensors[0]
        return configuration(kernel, m.dtype if kernel == "update" else g.dtype)

    def chunks(self, kernel):
        elements = _chunk(self.configuration(kernel))
        # triton.cdiv takes longer than the rest of a step's launch
        return sum(-(-n // elements) for n in self.sizes)


def configuration(kernel, dtype):
    """Launch options of "update" by the dtype of the moments, of "squares" by that of gradients."""
    row = _configurations.find(
        "adamw",
        kernel=kernel,
        architecture=_configurations.architecture(),
        bits=min(8 * dtype.itemsize, 32),
    )
    return {name: row[name] for name in ("BLOCK_N", "STEPS", "num_warps")}


def _chunk(options):
    return options["BLOCK_N"] * options["STEPS"]


def forward(tensors, hyperparameters, norm, max_norm, skip_nonfinite):
    """One step of all tensors, in place; into norm, unless it is None, the norm of g.

    tensors: (p, g, m, v, master or None) of each; hyperparameters: step … weight_decay of each.
    """
    batches, written_back = _batches(tensors, hyperparameters)
    run([(batch, _tables(batch)) for batch in batches], norm, max_norm, skip_nonfinite)
    for tensor, copy in written_back:
        tensor.copy_(copy)


def run(batches, norm, max_norm, skip_nonfinite):
    """Launch the kernels on (Batch, its Tables or None where it is one tensor)."""
    if norm is not None:
        _norm(batches, norm)
    for batch, tables in batches:
        p, g, m, v, master = batch.tensors[0]
        options = batch.configuration("update") | dict(
            HAS_MASTER=master is not None,
            CLIP=norm is not None,
            SKIP=skip_nonfinite,
            ACC=tl_accumulator(p.dtype),
        )
        programs = batch.chunks("update")
        # what is not used may be any address
        clip = p if norm is None else norm, float(max_norm or 0.0)
        if tables is None:
            launch(
                _adamw_kernel, programs,
                p, g, m, v, p if master is None else master, p.numel(), *clip,
                *batch.coefficients[0], **options,
            )  # fmt: skip
        else:
            launch(
                _adamw_list_kernel, programs,
                tables.tensors, tables.update_chunks, tables.coefficients, *clip,
                **dict(zip(("P_TYPE", "G_TYPE", "M_TYPE", "V_TYPE"), _types(batch))),
                ALIGNED=batch.aligned, **options,
            )  # fmt: skip


def _types(batch):
    return [_TL[x.dtype] for x in batch.tensors[0][:4]]


def _norm(batches, norm):
    """The norm of all gradients: partial sums of each batch side by side, then one program."""
    ACC = tl_accumulator(norm.dtype)
    chunks = [batch.chunks("squares") for batch, _ in batches]
    programs = [min(n, SQUARES_PROGRAMS) for n in chunks]
    parts = torch.empty(sum(programs), dtype=norm.dtype, device=norm.device)
    for (batch, tables), own, n in zip(batches, parts.split(programs), chunks):
        _, g, *_ = batch.tensors[0]
        options = batch.configuration("squares") | dict(ACC=ACC)
        if tables is None:
            launch(_adamw_squares_kernel, len(own), g, own, g.numel(), n, **options)
        else:
            launch(
                _adamw_squares_list_kernel, len(own),
                tables.tensors, tables.squares_chunks, own, n,
                G_TYPE=_TL[g.dtype], ALIGNED=batch.aligned, **options,
            )  # fmt: skip
    launch(
        _adamw_norm_kernel, 1,
        parts, norm, len(parts), BLOCK_N=SQUARES_PROGRAMS, ACC=ACC, num_warps=4,
    )  # fmt: skip


def _batches(tensors, hyperparameters):
    """([Batch], [(tensor, the copy that is updated in its place)]); empty tensors left out."""
    batches, written_back = {}, []
    for own, numbers in zip(tensors, hyperparameters):
        if own[0].numel() == 0:
            continue
        alike = _laid_out_alike(own)
        written_back += [(x, y) for x, y in zip(own, alike) if x is not y and x is not own[1]]
        aligned = all(x is None or x.data_ptr() % 16 == 0 for x in alike)
        key = *(None if x is None else x.dtype for x in alike), aligned
        batch = batches.setdefault(key, Batch([], [], aligned))
        batch.tensors.append(alike)
        batch.coefficients.append(coefficients(*numbers))
    return list(batches.values()), written_back


def _laid_out_alike(tensors):
    """The tensors, or copies of some: elements without gaps in memory, all in one order."""
    if all(x is None or x.is_contiguous() for x in tensors):
        return tensors
    # the strides of the first where it has no gaps, else those of a copy of it
    layout = torch.empty_like(tensors[0])
    return tuple(
        x
        if x is None or x.stride() == layout.stride()
        else torch.empty_like(layout, dtype=x.dtype).copy_(x)
        for x in tensors
    )


def _tables(batch):
    """Tables of a batch on its device; None for one tensor, which needs none.

    They are copied without waiting for the device, and kept: the same addresses, sizes or
    hyperparameters are not copied twice.
    """
    if len(batch.tensors) == 1:
        return None
    device = batch.tensors[0][0].device
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "adamw: lists must not be captured in a CUDA graph, which would keep addresses "
                "that change, got one; capture a call for each tensor"
            )
    addresses = tuple(
        (*(0 if x is None else x.data_ptr() for x in tensors), tensors[0].numel())
        for tensors in batch.tensors
    )
    return Tables(
        _numbers(addresses, torch.int64, device, stream),
        *(
            _chunks(batch.sizes, _chunk(batch.configuration(kernel)), device, stream)
            for kernel in ("update", "squares")
        ),
        _numbers(tuple(batch.coefficients), torch.float32, device, stream),
    )


@functools.lru_cache(maxsize=16)
def _numbers(rows, dtype, device, stream):
    return _copied(torch.tensor(rows, dtype=dtype, device="cpu"), device)


@functools.lru_cache(maxsize=16)
def _chunks(sizes, elements, device, stream):
    """(chunks, 2): the tensor of each chunk, and which of the tensor's it is."""
    counts = (torch.tensor(sizes, device="cpu") + elements - 1) // elements
    tensors = torch.repeat_interleave(counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return _copied(
        torch.stack([tensors, torch.arange(len(tensors), device="cpu") - first], 1), device
    )


def _copied(host, device):
    # from pageable memory the copy would wait for the device
    host = host.pin_memory() if device.type == "cuda" else host
    return host.to(device, non_blocking=True)
