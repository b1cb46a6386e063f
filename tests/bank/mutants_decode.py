"""Wrong paged_attention kernels: one new query, or a few, over a cache in pages."""

from dataclasses import dataclass

import torch

from . import models
from .models import rounded
from .mutants import mutant


@dataclass
class PagedAttention(models.PagedAttention):
    """A right kernel: keys in tiles of 16, split into three ranges."""

    block_n: int | None = 16
    splits: int = 3


@mutant("paged_attention", bug="page table ignored past the first page", seen="several pages")
class TableOfTheFirstPage(PagedAttention):
    def gather(self, pages, table):
        following = table[:, :1] + torch.arange(table.shape[1])
        return super().gather(pages, following % len(pages))


@mutant("paged_attention", bug="page table of the first row for all rows", seen="several rows")
class TableOfTheFirstRow(PagedAttention):
    def gather(self, pages, table):
        return super().gather(pages, table[:1].expand(table.shape))


@mutant("paged_attention", bug="page size hard-coded to 16", seen="pages of another size")
class PagesOf16(PagedAttention):
    def gather(self, pages, table):
        rows = super().gather(pages, table)
        slot = torch.arange(rows.shape[2])
        P, page = pages.shape[0], pages.shape[2]
        # the page is found by 16, the place in it as well
        index, place = slot // 16, slot % 16
        flat = pages.transpose(1, 2).flatten(0, 1)  # (P·page, Hkv, D)
        at = table[:, index % table.shape[1]] * 16 + place
        return flat[at % (P * page)].transpose(1, 2)


@mutant(
    "paged_attention",
    bug="garbage in the unwritten tail of a cache is read",
    seen="NaN past the length",
)
class TailOfTheCacheRead(PagedAttention):
    def forward(self, q, k_pages, v_pages, visible, scale, table):
        o, saved = super().forward(q, k_pages, v_pages, visible, scale, table)
        # p is 0 there, and 0·NaN is NaN
        v = self.gather(v_pages, table).repeat_interleave(q.shape[1] // v_pages.shape[1], 1)
        return o + (0 * v).sum(2, keepdim=True), saved


@mutant("paged_attention", bug="cache written one position late", seen="any lengths")
class CacheOneLate(PagedAttention):
    def gather(self, pages, table):
        return super().gather(pages, table).roll(1, 2)


@mutant(
    "paged_attention",
    bug="stale cache position after a reset",
    seen="shorter lengths after longer ones",
    after=True,
)
class StalePosition(PagedAttention):
    """Positions only ever rise, as those of a counter that nobody resets."""

    def __call__(self, q, k_pages, v_pages, block_table, lengths, **options):
        before = getattr(self, "position", lengths)
        if before.shape == lengths.shape:
            most = block_table.shape[1] * k_pages.shape[2]
            lengths = torch.maximum(lengths, before.clamp(max=most))
        self.position = lengths.clone()
        return super().__call__(q, k_pages, v_pages, block_table, lengths, **options)


@mutant("paged_attention", bug="partly filled last page left out", seen="lengths within a page")
class PartialPageLeftOut(PagedAttention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        visible = super().visible(Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens)
        whole = torch.clamp(lengths // self.page * self.page, min=1)
        return visible & (torch.arange(Tk) < whole[:, None, None, None])

    def __call__(self, q, k_pages, *rest, **options):
        self.page = k_pages.shape[2]
        return super().__call__(q, k_pages, *rest, **options)


@mutant(
    "paged_attention",
    bug="lengths ignored after the first batch row",
    seen="rows of different lengths",
)
class LengthOfTheFirstRow(PagedAttention):
    def __call__(self, q, k_pages, v_pages, block_table, lengths, **options):
        lengths = lengths[:1].expand(len(lengths)).contiguous()
        return super().__call__(q, k_pages, v_pages, block_table, lengths, **options)


@mutant("paged_attention", bug="length off by one", seen="any lengths")
class NewestKeyNotSeen(PagedAttention):
    def __call__(self, q, k_pages, v_pages, block_table, lengths, **options):
        return super().__call__(
            q, k_pages, v_pages, block_table, (lengths - 1).clamp(min=0), **options
        )


@mutant("paged_attention", bug="new queries see each other's future", seen="several new queries")
class NotCausal(PagedAttention):
    def visible(self, Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens):
        if window is not None:
            return super().visible(
                Tq, Tk, causal, align, window, global_tokens, lengths, cu_seqlens
            )
        return super().visible(Tq, Tk, False, align, None, 0, lengths, cu_seqlens)


@mutant("paged_attention", bug="window ignored", seen="a window")
class WindowIgnored(PagedAttention):
    def visible(self, Tq, Tk, causal, align, window, *rest):
        return super().visible(Tq, Tk, causal, align, None, *rest)


@mutant("paged_attention", bug="window one key too wide", seen="a window")
class WindowOneWide(PagedAttention):
    def visible(self, Tq, Tk, causal, align, window, *rest):
        window = None if window is None else window + 1
        return super().visible(Tq, Tk, causal, align, window, *rest)


@mutant("paged_attention", bug="query head h reads key head h mod Hkv", seen="grouped heads")
class HeadsInterleaved(PagedAttention):
    def heads(self, k, H):
        return k.repeat(1, H // k.shape[1], 1, 1)


@mutant("paged_attention", bug="head dimension hard-coded to 64", seen="a D over 64")
class HeadDim64(PagedAttention):
    def scores(self, q, k, visible, scale):
        return super().scores(q[..., :64], k[..., :64], visible, scale)


@mutant("paged_attention", bug="scale not applied", seen="the default scale")
class ScaleLeftOut(PagedAttention):
    def __call__(self, *inputs, scale=None, **options):
        return super().__call__(*inputs, scale=1.0, **options)


@mutant("paged_attention", bug="scale option ignored", seen="a scale")
class ScaleIgnored(PagedAttention):
    def __call__(self, *inputs, scale=None, **options):
        return super().__call__(*inputs, **options)


@mutant("paged_attention", bug="parts of a split row averaged, not weighted", seen="several splits")
class SplitsAveraged(PagedAttention):
    def merge(self, parts):
        o, lse = (torch.stack(x) for x in zip(*parts))
        return o.mean(0), lse.logsumexp(0)


@mutant("paged_attention", bug="parts of a split row merged in bf16", seen="float32 and float16",
        dtypes=("float32", "float16"))  # fmt: skip
class SplitsInBf16(PagedAttention):
    def merge(self, parts):
        o, lse = super().merge([(rounded(o, torch.bfloat16), lse) for o, lse in parts])
        return o, lse


@mutant(
    "paged_attention",
    bug="a row that sees nothing gives NaN",
    seen="length 0; more queries than keys",
)
class UnseeingRowsNaN(PagedAttention):
    splits = 1

    def normalise(self, acc, m_i, l_i):
        return acc / l_i[..., None], m_i + self.log(l_i)

    def merge(self, parts):
        return parts[0]

    def walk(self, q, k, v, visible, keep, dropout, scale, storage, part):
        everything = slice(0, k.shape[2])
        return super().walk(q, k, v, visible, keep, dropout, scale, storage, everything)


@mutant("paged_attention", bug="one tile configuration wrong", seen="more than 256 keys")
class WrongOverManyKeys(PagedAttention):
    def visible(self, Tq, Tk, *rest):
        return super().visible(Tq, Tk, *rest) & (torch.arange(Tk) != 256)
