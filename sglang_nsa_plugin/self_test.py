"""The self-test of an implementation: small fills with every edge in them, against the reference."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import torch as reference

POISON = -987_654_321
LENGTH_OFFSET = 2
MANY = 75  # times small_case: more requests than any implementation takes at once


def why_failed(
    bind: Callable[[FillArgs], Callable[[], None]],
    device: torch.device,
    errors: tuple[type[Exception], ...],
    by_request: bool = False,
) -> str | None:
    """How an implementation differs from the reference or cannot run, or None.

    ``by_request`` tests such fills alone; an implementation that fails them fills all others.
    ``errors`` are the implementation's own exceptions, besides RuntimeError, that mean it cannot run.
    """
    cannot_run: tuple[type[Exception], ...] = (RuntimeError, *errors)
    for times, ragged in itertools.product((1, MANY), (False,) if by_request else (False, True)):
        expected, actual = (small_case(device, ragged, times, by_request) for _ in range(2))
        reference.fill(expected)
        try:
            bind(actual)()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except cannot_run as error:
            return f"its self-test failed: {textwrap.shorten(str(error), 300)}"
        for name, tensor in actual.outputs().items():
            if not torch.equal(tensor, expected.outputs()[name]):
                return f"its self-test filled {name} with other values than the torch reference"
    return None


def small_case(device: torch.device, ragged: bool, times: int = 1, by_request: bool = False) -> FillArgs:
    """Four requests with the edges that matter, all outputs poisoned.

    L < q, L = 0, L over the top-k, L over the table, a request outside the pool and, in a ragged batch,
    rows after those of the last request. The requests are repeated ``times`` times.
    """
    requests, rows, columns, page_size = 4 * times, 12 * times, 40, 8

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values * times, dtype=dtype, device=device)

    args = FillArgs(
        seq_lens=tensor([1, 37, 0, 90]) - LENGTH_OFFSET,
        length_offset=LENGTH_OFFSET,
        req_pool_indices=tensor([2, 0, 1, 9]),
        req_to_token=torch.arange(4 * 44, dtype=torch.int32, device=device).view(4, 44),
        extend_lens=3,
        index_topk=36,
        page_size=page_size,
        **poisoned_outputs(requests, rows, columns, page_size, device),
        mqa_schedule=torch.full((6, 2), POISON, dtype=torch.int32, device=device),
        mqa_remainder_last=times > 1,
    )
    if by_request:
        lengths = torch.full((requests, 3), POISON, dtype=torch.int32, device=device)
        return replace(args, ctx_lens=lengths)
    if not ragged:
        return args
    row_count = torch.full((1,), POISON, dtype=torch.int32, device=device)
    rows_per_request = tensor([2, 4, 0, 3], torch.int32)
    return replace(args, extend_lens=rows_per_request, row_count=row_count, mqa_schedule=None)


def poisoned_outputs(
    requests: int, rows: int, columns: int, page_size: int, device: torch.device
) -> dict[str, Any]:
    """The lengths and tables of a fill by their names in FillArgs, :data:`POISON` in each cell."""
    shapes = {
        "cache_seqlens": (requests,),
        "cu_seqlens_k": (requests + 1,),
        "seqlens_expanded": (rows,),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "ctx_lens": (rows, 1),
        "page_table_1": (rows, columns),
        "real_page_table": (rows, columns // page_size),
    }
    return {
        name: torch.full(shape, POISON, dtype=torch.int32, device=device)
        for name, shape in shapes.items()
    }
