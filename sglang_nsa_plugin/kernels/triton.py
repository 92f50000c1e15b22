"""The fill in Triton, for GPUs where the compiled library cannot run.

One launch over a fixed grid. Program 0 writes lengths and sums; the others share the live columns of
the page tables. Nothing that changes from batch to batch is a compile-time constant, so one compile
serves every batch size, table and stride. A batch compiles anew only if other tensors are None, an index
dtype is another, or it is ragged or by request.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from sglang_nsa_plugin.fill_args import OUTPUTS, FillArgs, longest_row

# Raised besides RuntimeError where Triton cannot compile; the second comes from the C compiler.
ERRORS = (TritonError, subprocess.CalledProcessError)

TILE = 128  # requests scanned at a time
COLUMNS = 512  # table columns copied at a time
TABLE_PROGRAMS = 512

_NOT_SPECIALIZED = [
    "bs", "rows", "rows_per_request", "length_offset", "index_topk", "page_size",
    "pool", "tokens", "page_table_1_columns", "real_page_table_columns",
    "seq_lens_stride", "extend_lens_stride", "index_stride",
    "tokens_stride_0", "tokens_stride_1",
    "cache_seqlens_stride", "cu_seqlens_k_stride", "expanded_stride", "clamped_stride",
    "clamped_sums_stride", "ctx_lens_stride", "ctx_lens_stride_1",
    "page_table_1_stride_0", "page_table_1_stride_1",
    "real_page_table_stride_0", "real_page_table_stride_1",
    "schedule_stride_0", "schedule_stride_1", "processors", "longest",
]  # fmt: skip
_UNALIGNED = [
    "seq_lens", "extend_lens", "req_pool_indices", "req_to_token", "cache_seqlens", "cu_seqlens_k",
    "seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "ctx_lens", "page_table_1",
    "real_page_table", "row_count", "mqa_schedule", "enabled",
]  # fmt: skip


@triton.jit
def _rows_of(extend_lens, stride, r, mask, rows_per_request, RAGGED: tl.constexpr):
    if RAGGED:
        q = tl.load(extend_lens + r.to(tl.int64) * stride, mask=mask, other=0).to(tl.int64)
        q = tl.minimum(tl.maximum(q, 0), 2147483647)
    else:
        q = tl.where(mask, rows_per_request.to(tl.int64), 0)
    return q


@triton.jit
def _length(seq_lens, stride, offset, r, mask):
    # 0 where the mask is off; the low 32 bits of the sum
    seq_len = tl.load(seq_lens + r.to(tl.int64) * stride, mask=mask, other=0).to(tl.int32)
    return tl.where(mask, (seq_len.to(tl.int64) + offset).to(tl.int32), 0).to(tl.int64)


@triton.jit
def _clamped_sum(first, n, topk):
    # sum of min(max(first + j, 0), topk) over j < n, modulo 2^64
    rising = tl.minimum(tl.maximum(-first, 0), n)
    level = tl.minimum(tl.maximum(topk - first, rising), n)
    steps = level - rising
    # one factor of an even product is even: halve that one, so that nothing overflows
    ends = rising + level - 1
    half = tl.where(steps % 2 == 0, (steps // 2) * ends, steps * (ends // 2))
    return steps * first + half + (n - level) * topk


@triton.jit
def _fill_lengths(
    seq_lens, seq_lens_stride, length_offset, extend_lens, extend_lens_stride, rows_per_request,
    bs, rows, index_topk,
    cache_seqlens, cache_seqlens_stride, cu_seqlens_k, cu_seqlens_k_stride,
    seqlens_expanded, expanded_stride, nsa_cache_seqlens, clamped_stride,
    nsa_cu_seqlens_k, clamped_sums_stride, ctx_lens, ctx_lens_stride, ctx_lens_stride_1, row_count,
    RAGGED: tl.constexpr, HAS_EXPANDED: tl.constexpr, HAS_CTX_LENS: tl.constexpr,
    BY_REQUEST: tl.constexpr, HAS_ROW_COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tl.store(cu_seqlens_k, 0)
    tl.store(nsa_cu_seqlens_k, 0)
    topk = index_topk.to(tl.int64)
    row = tl.zeros((), tl.int64)
    lengths = tl.zeros((), tl.int64)
    sums = tl.zeros((), tl.int64)
    for start in tl.range(0, bs, TILE):
        r = start + tl.arange(0, TILE)
        mask = r < bs
        length = _length(seq_lens, seq_lens_stride, length_offset, r, mask)
        q = _rows_of(extend_lens, extend_lens_stride, r, mask, rows_per_request, RAGGED)
        r64 = r.to(tl.int64)
        tl.store(cache_seqlens + r64 * cache_seqlens_stride, length.to(tl.int32), mask=mask)
        length_ends = lengths + tl.cumsum(length, 0)
        tl.store(cu_seqlens_k + (r64 + 1) * cu_seqlens_k_stride, length_ends.to(tl.int32), mask=mask)

        first = length - q + 1
        row_of = row + tl.cumsum(q, 0) - q
        own = _clamped_sum(first, q, topk)
        sum_of = sums + tl.cumsum(own, 0) - own
        fitting = tl.where(mask, tl.minimum(q, tl.maximum(rows - row_of, 0)), 0)
        for j in tl.range(0, tl.max(fitting, 0)):
            live = j < fitting
            t = row_of + j
            expanded = tl.maximum(first + j, 0)
            if HAS_EXPANDED:
                tl.store(seqlens_expanded + t * expanded_stride, expanded.to(tl.int32), mask=live)
            clamped = tl.minimum(expanded, topk)
            tl.store(nsa_cache_seqlens + t * clamped_stride, clamped.to(tl.int32), mask=live)
            running = sum_of + _clamped_sum(first, j + tl.full((TILE,), 1, tl.int64), topk)
            tl.store(nsa_cu_seqlens_k + (t + 1) * clamped_sums_stride, running.to(tl.int32), mask=live)
            if BY_REQUEST:
                column = (j + tl.zeros((TILE,), tl.int64)) * ctx_lens_stride_1
                context = ctx_lens + r64 * ctx_lens_stride + column
                tl.store(context, length.to(tl.int32), mask=live)
            elif HAS_CTX_LENS:
                tl.store(ctx_lens + t * ctx_lens_stride, expanded.to(tl.int32), mask=live)
        row += tl.sum(q, 0)
        lengths += tl.sum(length, 0)
        sums += tl.sum(own, 0)

    in_use = tl.minimum(row, rows)
    if HAS_ROW_COUNT:
        tl.store(row_count, in_use.to(tl.int32))
    for start in tl.range(in_use, rows.to(tl.int64), TILE):
        t = (start + tl.arange(0, TILE)).to(tl.int64)
        mask = t < rows
        zero = tl.zeros((TILE,), tl.int32)
        if HAS_EXPANDED:
            tl.store(seqlens_expanded + t * expanded_stride, zero, mask=mask)
        tl.store(nsa_cache_seqlens + t * clamped_stride, zero, mask=mask)
        tl.store(nsa_cu_seqlens_k + (t + 1) * clamped_sums_stride, zero + sums.to(tl.int32), mask=mask)
        if HAS_CTX_LENS:
            tl.store(ctx_lens + t * ctx_lens_stride, zero, mask=mask)


@triton.jit
def _segments(seq_lens, seq_lens_stride, length_offset, q, t, items, longest, BY_REQUEST: tl.constexpr):
    # of the items t, which are rows or requests; 0 after the last one
    mask = t < items
    if BY_REQUEST:
        length = _length(seq_lens, seq_lens_stride, length_offset, t, mask)
        expanded = tl.maximum(length, 0)
        rows = q
    else:
        r = t // q
        length = _length(seq_lens, seq_lens_stride, length_offset, r, mask)
        rows_after = q - 1 - (t - r * q)
        expanded = tl.maximum(tl.maximum(length, 0) - rows_after, 0)
        rows = tl.full((), 1, tl.int64)
    return tl.where(mask, rows * ((tl.minimum(expanded, longest.to(tl.int64)) + 255) // 256), 0)


@triton.jit
def _fill_schedule(
    seq_lens, seq_lens_stride, length_offset, rows_per_request, items,
    mqa_schedule, stride_0, stride_1, processors, longest,
    BY_REQUEST: tl.constexpr, REMAINDER_LAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, TILE)
    q = rows_per_request.to(tl.int64)
    total = tl.zeros((), tl.int64)
    for start in tl.range(0, items, TILE):
        t = start + local
        segments = _segments(seq_lens, seq_lens_stride, length_offset, q, t, items, longest, BY_REQUEST)
        total += tl.sum(segments, 0)
    each = total // processors
    longer = total - each * processors
    for first in tl.range(0, processors + 1, TILE):
        p = (first + local).to(tl.int64)
        if REMAINDER_LAST:
            begin = p * each + tl.maximum(p - (processors - longer), 0)
        else:
            begin = p * each + tl.minimum(p, longer)
        item = tl.zeros((TILE,), tl.int32)
        before = tl.zeros((TILE,), tl.int64)
        sums = tl.zeros((), tl.int64)
        for start in tl.range(0, items, TILE):
            t = start + local
            segments = _segments(
                seq_lens, seq_lens_stride, length_offset, q, t, items, longest, BY_REQUEST
            )
            ends = sums + tl.cumsum(segments, 0)
            passed = (ends[None, :] <= begin[:, None]) & (t < items)[None, :]
            item += tl.sum(passed.to(tl.int32), 1)
            before = tl.maximum(before, tl.max(tl.where(passed, ends[None, :], 0), 1))
            sums += tl.sum(segments, 0)
        mask = p <= processors
        out = mqa_schedule + p * stride_0
        segment = tl.where(item < items, begin - before, 0)
        if BY_REQUEST:
            item = (item * q).to(tl.int32)
            segment = segment // q
        tl.store(out, item, mask=mask)
        tl.store(out + stride_1, segment.to(tl.int32), mask=mask)


@triton.jit
def _fill_table(
    program, programs,
    seq_lens, seq_lens_stride, length_offset, extend_lens, extend_lens_stride, rows_per_request,
    bs, rows,
    req_pool_indices, index_stride, req_to_token, tokens_stride_0, tokens_stride_1, pool, tokens,
    table, stride_0, stride_1, table_columns, page_size,
    RAGGED: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.zeros((), tl.int64)
    local = tl.arange(0, TILE)
    page = page_size.to(tl.int64)
    row_stride = stride_0.to(tl.int64)  # an interpreted loop counts in int32
    for start in tl.range(0, bs, TILE):
        r = start + local
        mask = r < bs
        length = _length(seq_lens, seq_lens_stride, length_offset, r, mask)
        q = _rows_of(extend_lens, extend_lens_stride, r, mask, rows_per_request, RAGGED)
        live = tl.minimum(tl.maximum(length, 0), tokens)
        columns = tl.minimum((live + page - 1) // page, table_columns)
        units = (columns + COLUMNS - 1) // COLUMNS
        unit_ends = tl.cumsum(units, 0)
        for unit in tl.range(program, tl.sum(units, 0).to(tl.int32), programs):
            t = tl.sum((unit_ends <= unit).to(tl.int32), 0)
            here = local == t
            before = local < t
            block = unit - tl.sum(tl.where(before, units, 0), 0)
            first_row = row + tl.sum(tl.where(before, q, 0), 0)
            own_rows = tl.minimum(tl.sum(tl.where(here, q, 0), 0), tl.maximum(rows - first_row, 0))
            c = block * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
            keep = c < tl.sum(tl.where(here, columns, 0), 0)
            index = tl.load(req_pool_indices + (start + t).to(tl.int64) * index_stride).to(tl.int64)
            in_pool = (index >= 0) & (index < pool)
            slot = tl.load(
                req_to_token + index * tokens_stride_0 + c * page * tokens_stride_1,
                mask=keep & in_pool, other=0,
            ).to(tl.int32).to(tl.int64)  # fmt: skip
            value = tl.where(slot >= 0, slot // page, -((page - 1 - slot) // page)).to(tl.int32)
            # Counts from 0 and adds: Triton 3.6 drops `row`, which the loop over requests carries,
            # where it only bounds an inner loop.
            for j in tl.range(0, own_rows):
                tl.store(table + (first_row + j) * row_stride + c * stride_1, value, mask=keep)
        row += tl.sum(q, 0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def _fill_kernel(
    seq_lens, extend_lens, req_pool_indices, req_to_token,
    cache_seqlens, cu_seqlens_k, seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k,
    ctx_lens, page_table_1, real_page_table, row_count, mqa_schedule, enabled,
    bs, rows, rows_per_request, length_offset, index_topk, page_size, pool, tokens,
    page_table_1_columns, real_page_table_columns,
    seq_lens_stride, extend_lens_stride, index_stride, tokens_stride_0, tokens_stride_1,
    cache_seqlens_stride, cu_seqlens_k_stride, expanded_stride, clamped_stride,
    clamped_sums_stride, ctx_lens_stride, ctx_lens_stride_1,
    page_table_1_stride_0, page_table_1_stride_1, real_page_table_stride_0, real_page_table_stride_1,
    schedule_stride_0, schedule_stride_1, processors, longest,
    RAGGED: tl.constexpr, HAS_EXPANDED: tl.constexpr, HAS_CTX_LENS: tl.constexpr,
    BY_REQUEST: tl.constexpr, HAS_ROW_COUNT: tl.constexpr, HAS_SCHEDULE: tl.constexpr,
    REMAINDER_LAST: tl.constexpr, HAS_PAGE_TABLE_1: tl.constexpr, HAS_REAL_PAGE_TABLE: tl.constexpr,
    HAS_SWITCH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if HAS_SWITCH:
        if tl.load(enabled) == 0:
            return
    program = tl.program_id(0)
    if program == 0:
        _fill_lengths(
            seq_lens, seq_lens_stride, length_offset, extend_lens, extend_lens_stride, rows_per_request,
            bs, rows, index_topk,
            cache_seqlens, cache_seqlens_stride, cu_seqlens_k, cu_seqlens_k_stride,
            seqlens_expanded, expanded_stride, nsa_cache_seqlens, clamped_stride,
            nsa_cu_seqlens_k, clamped_sums_stride, ctx_lens, ctx_lens_stride, ctx_lens_stride_1,
            row_count, RAGGED, HAS_EXPANDED, HAS_CTX_LENS, BY_REQUEST, HAS_ROW_COUNT, TILE,
        )  # fmt: skip
        return
    if HAS_SCHEDULE:
        if program == 1:
            _fill_schedule(
                seq_lens, seq_lens_stride, length_offset, rows_per_request,
                bs if BY_REQUEST else rows,
                mqa_schedule, schedule_stride_0, schedule_stride_1, processors, longest,
                BY_REQUEST, REMAINDER_LAST, TILE,
            )  # fmt: skip
            return
    before: tl.constexpr = 2 if HAS_SCHEDULE else 1
    programs = tl.num_programs(0) - before
    if HAS_PAGE_TABLE_1:
        _fill_table(
            program - before, programs,
            seq_lens, seq_lens_stride, length_offset, extend_lens, extend_lens_stride, rows_per_request,
            bs, rows,
            req_pool_indices, index_stride, req_to_token, tokens_stride_0, tokens_stride_1, pool,
            tokens, page_table_1, page_table_1_stride_0, page_table_1_stride_1, page_table_1_columns,
            tl.full((), 1, tl.int32), RAGGED, TILE, COLUMNS,
        )  # fmt: skip
    if HAS_REAL_PAGE_TABLE:
        _fill_table(
            program - before, programs,
            seq_lens, seq_lens_stride, length_offset, extend_lens, extend_lens_stride, rows_per_request,
            bs, rows,
            req_pool_indices, index_stride, req_to_token, tokens_stride_0, tokens_stride_1, pool,
            tokens, real_page_table, real_page_table_stride_0, real_page_table_stride_1,
            real_page_table_columns, page_size, RAGGED, TILE, COLUMNS,
        )  # fmt: skip


def bind(args: FillArgs) -> Callable[[], None]:
    """Returns a function that launches the fill on the stream that is current when it is called."""
    has_tables = args.page_table_1 is not None or args.real_page_table is not None
    has_schedule = args.mqa_schedule is not None
    launch = _fill_kernel[(1 + has_schedule + (TABLE_PROGRAMS if has_tables else 0),)]
    arguments = (*_tensors(args), *_sizes(args), *_strides(args), *_schedule_sizes(args))
    flags = {
        "RAGGED": isinstance(args.extend_lens, torch.Tensor),
        "HAS_EXPANDED": args.seqlens_expanded is not None,
        "HAS_CTX_LENS": args.ctx_lens is not None,
        "BY_REQUEST": args.is_by_request,
        "HAS_ROW_COUNT": args.row_count is not None,
        "HAS_SCHEDULE": has_schedule,
        "REMAINDER_LAST": args.mqa_remainder_last,
        "HAS_PAGE_TABLE_1": args.page_table_1 is not None,
        "HAS_REAL_PAGE_TABLE": args.real_page_table is not None,
        "HAS_SWITCH": args.enabled is not None,
    }

    def run() -> None:
        with _current(args.device):
            launch(*arguments, **flags, TILE=TILE, COLUMNS=COLUMNS)

    return run


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; on the CPU its interpreter runs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _tensors(args: FillArgs) -> list[torch.Tensor]:
    """The kernel's tensors in its order. In the place of None stands another tensor, never read."""
    names = ("extend_lens", "req_pool_indices", "req_to_token", *OUTPUTS, "enabled")
    present = args.inputs() | args.outputs()
    return [args.seq_lens, *(present.get(name, args.cache_seqlens) for name in names)]


def _sizes(args: FillArgs) -> list[int]:
    pool, tokens = (0, 0) if args.req_to_token is None else args.req_to_token.shape
    rows_per_request = args.extend_lens if isinstance(args.extend_lens, int) else 0
    tables = (args.page_table_1, args.real_page_table)
    columns = [0 if table is None else table.shape[1] for table in tables]
    return [
        args.bs, args.rows, rows_per_request, args.length_offset, args.index_topk, args.page_size,
        pool, tokens, *columns,
    ]  # fmt: skip


def _strides(args: FillArgs) -> list[int]:
    def strides(tensor: torch.Tensor | int | None, dims: int) -> tuple[int, ...]:
        return tensor.stride()[:dims] if isinstance(tensor, torch.Tensor) else (0,) * dims

    vectors = (
        args.seq_lens, args.extend_lens, args.req_pool_indices,
    )  # fmt: skip
    outputs = (
        args.cache_seqlens, args.cu_seqlens_k, args.seqlens_expanded, args.nsa_cache_seqlens,
        args.nsa_cu_seqlens_k, args.ctx_lens,
    )  # fmt: skip
    return [
        *(stride for vector in vectors for stride in strides(vector, 1)),
        *strides(args.req_to_token, 2),
        *(stride for vector in outputs for stride in strides(vector, 1)),
        strides(args.ctx_lens, 2)[1] if args.is_by_request else 0,
        *strides(args.page_table_1, 2),
        *strides(args.real_page_table, 2),
        *strides(args.mqa_schedule, 2),
    ]


def _schedule_sizes(args: FillArgs) -> tuple[int, int]:
    processors = 1 if args.mqa_schedule is None else args.mqa_schedule.shape[0] - 1
    return processors, longest_row(args.rows)
