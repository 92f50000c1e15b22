"""The definition of a k-pooling fill in plain torch: the table in ``kpool_args.py``, line by line.

Like ``torch.py`` it runs on any device, and never asks the device for a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sglang_nsa_plugin.kernels.torch import running_sums, schedule
from sglang_nsa_plugin.kpool_args import KPoolArgs


def bind(args: KPoolArgs) -> Callable[[], None]:
    """Returns a function that fills the outputs of ``args``."""
    return functools.partial(fill, args)


def fill(args: KPoolArgs) -> None:
    """Fills the outputs of ``args``."""
    k, n = args.index_kpool, args.extend_lens
    length = _low_32_bits(args.seq_lens.to(torch.int64) + args.length_offset)
    start = _low_32_bits(length - n)
    after = torch.arange(1, n + 1, device=args.device)
    expanded = (length[:, None] - n + after).clamp(min=0).flatten()
    unfinished = expanded % k
    clamped = (expanded - unfinished).clamp(max=args.index_topk) + unfinished
    row_seqlens = _low_32_bits(start[:, None] + after).flatten()
    kpool_seqlens = _divide(row_seqlens, k)

    write = functools.partial(_write, args.enabled)
    write(args.nsa_cache_seqlens, clamped)
    write(args.nsa_cu_seqlens_k, running_sums(clamped))
    write(args.write_requests, args.req_pool_indices)
    write(args.write_start, start)
    write(args.tail_start, _divide(start, k) * k)
    write(args.kpool_seqlens, kpool_seqlens)
    _write_locs(args, write, start, length)
    if args.write_counts is not None and args.accept_lens is not None:
        write(args.write_counts, args.accept_lens)
    if args.row_seqlens is not None:
        write(args.row_seqlens, row_seqlens)
    if args.kpool_page_table is not None:
        _write_table(args, write, args.kpool_page_table, length)
    if args.kpool_schedule is not None:
        processors = args.kpool_schedule.shape[0] - 1
        items = kpool_seqlens.clamp(min=1)
        write(args.kpool_schedule, schedule(items, processors, args.mqa_remainder_last))


def _write_locs(
    args: KPoolArgs,
    write: Callable[[torch.Tensor, torch.Tensor], None],
    start: torch.Tensor,
    length: torch.Tensor,
) -> None:
    p = torch.arange(args.write_locs.shape[1], device=args.device)
    kpool = _divide(start, args.index_kpool)[:, None] + p
    column = _divide(kpool, args.page_size)
    cell = kpool - column * args.page_size
    pages, is_live = _pages(args, column.clamp(min=0), length)
    write(args.write_locs, torch.where(is_live, pages * args.page_size + cell, args.write_locs))


def _write_table(
    args: KPoolArgs,
    write: Callable[[torch.Tensor, torch.Tensor], None],
    table: torch.Tensor,
    length: torch.Tensor,
) -> None:
    columns = torch.arange(table.shape[1], device=args.device).expand(args.bs, -1)
    pages, is_live = _pages(args, columns, length)
    pages, is_live = (each.repeat_interleave(args.extend_lens, dim=0) for each in (pages, is_live))
    write(table, torch.where(is_live, pages, table))


def _pages(
    args: KPoolArgs, column: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 page(r, c) for each of ``column`` [bs, any], and which of them are live."""
    pool, tokens = args.req_to_token.shape
    token = column * (args.page_size * args.index_kpool)
    is_live = (token < length[:, None]) & (token < tokens)
    if 0 in (args.req_to_token.numel(), token.numel()):
        return torch.zeros_like(token), is_live
    index = args.req_pool_indices.to(torch.int64)[:, None]
    is_in_pool = (index >= 0) & (index < pool)
    slots = args.req_to_token[index.clamp(0, pool - 1), token.clamp(max=tokens - 1)]
    slots = torch.where(is_in_pool, _low_32_bits(slots), 0)
    return slots // args.server_page_size, is_live


def _low_32_bits(values: torch.Tensor) -> torch.Tensor:
    """The low 32 bits, signed, as int64."""
    return values.to(torch.int32).to(torch.int64)


def _divide(values: torch.Tensor, divisor: int) -> torch.Tensor:
    """Rounds toward 0, as SGLang's Triton kernels do."""
    return torch.div(values, divisor, rounding_mode="trunc")


def _write(enabled: torch.Tensor | None, out: torch.Tensor, values: torch.Tensor) -> None:
    """Converts to the type of ``out``, keeping the low bits; leaves it alone where ``enabled`` is 0."""
    values = values.to(out.dtype)
    out.copy_(values if enabled is None else torch.where(enabled != 0, values, out))
