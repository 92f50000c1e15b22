"""The definition of a fill in plain torch. Every other implementation is compared with it.

It reads like the table in ``fill_args.py``, runs on any device and launches some thirty operations. It
never asks the device for a number, so it can be captured too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sglang_nsa_plugin.fill_args import INT32_MAX, SEGMENT, FillArgs, longest_row


def bind(args: FillArgs) -> Callable[[], None]:
    """Returns a function that fills the outputs of ``args``."""
    return functools.partial(fill, args)


def fill(args: FillArgs) -> None:
    """Fills the outputs of ``args``."""
    length = (args.seq_lens.to(torch.int64) + args.length_offset).to(torch.int32).to(torch.int64)
    q = _rows_per_request(args)
    ends = torch.cumsum(q, dim=0)
    row = torch.arange(args.rows, device=args.device)
    request = torch.searchsorted(ends, row, right=True)
    in_use = request < args.bs
    request = request.clamp(max=max(args.bs - 1, 0))

    expanded = torch.zeros_like(row)
    if args.bs > 0:
        j = row - (ends - q)[request]
        expanded = (length[request] - q[request] + 1 + j).clamp(min=0)
    expanded = torch.where(in_use, expanded, 0)
    clamped = expanded.clamp(max=args.index_topk)

    write = functools.partial(_write, args.enabled)
    write(args.cache_seqlens, length)
    write(args.cu_seqlens_k, running_sums(length))
    write(args.nsa_cache_seqlens, clamped)
    write(args.nsa_cu_seqlens_k, running_sums(clamped))
    if args.seqlens_expanded is not None:
        write(args.seqlens_expanded, expanded)
    if args.ctx_lens is not None:
        of_requests = length[:, None].expand(args.bs, args.ctx_lens.shape[-1])
        write(args.ctx_lens, of_requests if args.is_by_request else expanded.view(args.ctx_lens.shape))
    if args.row_count is not None:
        write(args.row_count, q.sum().clamp(max=args.rows).view(1))
    if args.mqa_schedule is not None:
        items, rows_of_item = _items(args, length, expanded)
        processors, last = args.mqa_schedule.shape[0] - 1, args.mqa_remainder_last
        write(args.mqa_schedule, schedule(items, processors, last, rows_of_item))
    if args.page_table_1 is not None:
        _write_table(args, write, args.page_table_1, 1, request, in_use, length)
    if args.real_page_table is not None:
        _write_table(args, write, args.real_page_table, args.page_size, request, in_use, length)


def _rows_per_request(args: FillArgs) -> torch.Tensor:
    if isinstance(args.extend_lens, int):
        return torch.full((args.bs,), args.extend_lens, device=args.device)
    return args.extend_lens.to(torch.int64).clamp(0, INT32_MAX)


def _items(args: FillArgs, length: torch.Tensor, expanded: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The lengths of what the schedule deals out, rows or requests, and how many rows each has."""
    if not args.is_by_request or args.bs == 0:
        return expanded, 1
    return length.clamp(min=0), args.rows // args.bs


def running_sums(values: torch.Tensor) -> torch.Tensor:
    """0, then the sums up to each value."""
    return torch.cat([values.new_zeros(1), torch.cumsum(values, dim=0)])


def schedule(
    lengths: torch.Tensor, processors: int, remainder_last: bool, rows: int = 1
) -> torch.Tensor:
    """The row and segment where each processor begins, and the end of all segments.

    ``lengths`` are those of the items that are dealt out: rows or, with so many ``rows`` each, requests.
    """
    items = lengths.shape[0]
    segments = rows * ((lengths.clamp(max=longest_row(items * rows)) + SEGMENT - 1) // SEGMENT)
    ends = running_sums(segments)
    total = ends[-1]
    p = torch.arange(processors + 1, device=lengths.device)
    longer = total % processors
    longer_before = (
        (p - processors + longer).clamp(min=0) if remainder_last else torch.minimum(p, longer)
    )
    begin = p * (total // processors) + longer_before
    item = torch.searchsorted(ends[1:].contiguous(), begin, right=True)
    segment = torch.where(item < items, (begin - ends[item]) // rows, 0)
    return torch.stack([item * rows, segment], dim=1)


def _write(enabled: torch.Tensor | None, out: torch.Tensor, values: torch.Tensor) -> None:
    """Converts to int32, keeping the low 32 bits; leaves ``out`` alone where ``enabled`` is 0."""
    values = values.to(torch.int32)
    out.copy_(values if enabled is None else torch.where(enabled != 0, values, out))


def _write_table(
    args: FillArgs,
    write: Callable[[torch.Tensor, torch.Tensor], None],
    table: torch.Tensor,
    page_size: int,
    request: torch.Tensor,
    in_use: torch.Tensor,
    length: torch.Tensor,
) -> None:
    assert args.req_to_token is not None
    assert args.req_pool_indices is not None
    pool, tokens = args.req_to_token.shape
    if args.bs == 0 or tokens == 0:
        return
    column = torch.arange(0, min(table.shape[1] * page_size, tokens), page_size, device=args.device)
    index = args.req_pool_indices.to(torch.int64)[request]
    slots = args.req_to_token[index.clamp(0, max(pool - 1, 0))[:, None], column] if pool else 0
    in_pool = (index >= 0) & (index < pool)
    pages = torch.where(in_pool[:, None], slots, 0).to(torch.int32) // page_size
    live = in_use[:, None] & (column < length[request][:, None])
    out = table[:, : len(column)]
    write(out, torch.where(live, pages, out))
