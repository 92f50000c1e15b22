"""A floor for the page-64 table: a kernel that is given what the fill has to look up.

It knows that all requests have the same length and which rows of ``req_to_token`` are theirs, and writes
no metadata: no load waits for another, and each token of a page is read once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

BLOCKS = (128, 256, 512, 1_024, 2_048)  # pages of a block
WARPS = (4, 8)


@triton.jit
def _copy_pages(
    slots, table, slots_stride, table_stride, pages,
    page_size: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * block + tl.arange(0, block)
    is_live = page < pages
    slot = tl.load(slots + request * slots_stride + page * page_size, mask=is_live, other=0)
    number = (slot.to(tl.uint32) // page_size).to(tl.int32)
    out = table + request * rows * table_stride + page
    for row in tl.static_range(rows):
        tl.store(out + row * table_stride, number, mask=is_live)


def launches(
    slots: torch.Tensor, table: torch.Tensor, length: int, draft_tokens: int, page_size: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same copy by blocks of different sizes, each with its name.

    Args:
        slots: int32 [requests, width], the row of each request.
        table: int32 [requests * draft_tokens, ceil(width / page_size)], as many rows for each request.
        length: of every request, in tokens.
        draft_tokens: rows of each request.
        page_size: tokens of a page.
    """
    pages = -(-length // page_size)
    strides = slots.stride(0), table.stride(0)
    for block, warps in itertools.product(BLOCKS, WARPS):
        launch = _copy_pages[slots.shape[0], triton.cdiv(pages, block)]
        sizes = {"page_size": page_size, "rows": draft_tokens, "block": block, "num_warps": warps}
        yield (
            f"{block} pages, {warps} warps",
            functools.partial(launch, slots, table, *strides, pages, **sizes),
        )
