"""Finds out at start-up whether the fill can make DeepGEMM's schedule for paged MQA logits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from sglang_nsa_plugin.adapters.eager_names import DSA
from sglang_nsa_plugin.fill_args import FillArgs

PAGE_SIZE = 64
LONGEST = 163_840
ROWS = (30, 512)  # of the ragged batches; DeepGEMM compiles one kernel for each 32 rows


def remainder_last(
    backend: Any, bind: Callable[[FillArgs], Callable[[], None]], columns: int = 1
) -> bool | None:
    """The ``mqa_remainder_last`` with which ``bind`` writes what the installed DeepGEMM writes.

    Which processors take the segments that do not divide evenly depends on DeepGEMM's release and on the
    architecture. None where neither way gives DeepGEMM's schedule, and on the CPU, where SGLang makes
    none: then the schedule is left to DeepGEMM. ``columns`` are those of the context lengths; more than
    one, and the schedule goes by requests, which SGLang asks for on a GPU alone.
    """
    if columns == 1 and backend.req_to_token.device.type != "cuda":
        return None
    batches = [
        lengths.view(-1, 1).expand(-1, columns).contiguous()
        for lengths in probes(backend.req_to_token.device, LONGEST)
    ]
    theirs = [(lengths, _of_deep_gemm(backend, lengths)) for lengths in batches]
    return remainder_of(theirs, functools.partial(_of_fill, bind))


def remainder_of(
    theirs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ours: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
) -> bool | None:
    """The ``mqa_remainder_last`` with which ``ours`` makes all these schedules, or None.

    ``theirs`` has lengths, each with its schedule. ``ours`` takes lengths, a schedule of the shape to
    make, and the ``mqa_remainder_last`` to try.
    """
    for last in (True, False):
        if all(torch.equal(ours(lengths, like, last), like) for lengths, like in theirs):
            return last
    return None


def refresh(backend: Any, metadata: Any, ctx_lens: torch.Tensor) -> None:
    """SGLang's own schedule of these lengths, into the metadata. Its method came with 0.5.15."""
    if hasattr(backend, "_refresh_paged_mqa_schedule_metadata"):
        backend._refresh_paged_mqa_schedule_metadata(metadata=metadata, seqlens_32_2d=ctx_lens)
        return
    deep_gemm = sys.modules[DSA.module].deep_gemm
    schedule = deep_gemm.get_paged_mqa_logits_metadata(ctx_lens, PAGE_SIZE, deep_gemm.get_num_sms())
    if metadata.paged_mqa_schedule_metadata is None:
        object.__setattr__(metadata, "paged_mqa_schedule_metadata", schedule)
    else:
        metadata.paged_mqa_schedule_metadata.copy_(schedule)


def probes(device: torch.device, longest: int) -> list[torch.Tensor]:
    """Batches of lengths around a segment of 256, and ragged ones below ``longest``."""
    random = torch.Generator().manual_seed(0)
    edges = [[0], [1], [255], [256], [257], [0] * 5]
    ragged = [torch.randint(0, longest, (rows,), generator=random) for rows in ROWS]
    ragged[-1][::7] = 0
    batches = [*map(torch.tensor, edges), *ragged]
    return [lengths.to(device, torch.int32) for lengths in batches]


def _of_deep_gemm(backend: Any, lengths: torch.Tensor) -> torch.Tensor:
    """The schedule by SGLang's own call, which sets it on an object that has none."""
    metadata = SimpleNamespace(paged_mqa_schedule_metadata=None)
    refresh(backend, metadata, lengths)
    schedule: torch.Tensor = metadata.paged_mqa_schedule_metadata
    return schedule


def _of_fill(
    bind: Callable[[FillArgs], Callable[[], None]],
    lengths: torch.Tensor,
    like: torch.Tensor,
    last: bool,
) -> torch.Tensor:
    def output(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=lengths.device)

    bs, columns = lengths.shape
    rows = bs * columns
    args = FillArgs(
        seq_lens=lengths[:, 0],
        req_pool_indices=None,
        req_to_token=None,
        extend_lens=columns,
        index_topk=1,
        page_size=PAGE_SIZE,
        cache_seqlens=output(bs),
        cu_seqlens_k=output(bs + 1),
        seqlens_expanded=output(rows),
        nsa_cache_seqlens=output(rows),
        nsa_cu_seqlens_k=output(rows + 1),
        ctx_lens=torch.empty_like(lengths),
        mqa_schedule=torch.full_like(like, -1),
        mqa_remainder_last=last,
    )
    bind(args)()
    assert args.mqa_schedule is not None
    return args.mqa_schedule
