"""The draft-extend fill of SGLang 0.5.7 to 0.5.9, written anew from the operations that it launches.

The host knows the lengths, reads from the device how many tokens each request accepted, and makes the
row lengths of each request with its own ``torch.arange``. It waits for the device twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_nsa_plugin.fill_args import FillArgs


def bind(args: FillArgs) -> Callable[[], None]:
    """A function that fills both page tables and all lengths of ``args``, a uniform batch."""
    assert isinstance(args.extend_lens, int)
    host_lengths = args.seq_lens.cpu()
    accepted = torch.full((args.bs,), args.extend_lens, dtype=torch.int32, device=args.device)

    def run() -> None:
        _fill(args, host_lengths, accepted)

    return run


def _fill(args: FillArgs, host_lengths: torch.Tensor, accepted: torch.Tensor) -> None:
    assert args.req_to_token is not None
    assert args.req_pool_indices is not None
    assert args.page_table_1 is not None
    assert args.real_page_table is not None
    assert args.seqlens_expanded is not None
    longest = int(host_lengths.max())
    lengths = args.seq_lens.to(torch.int32)
    args.cache_seqlens.copy_(lengths)
    args.cu_seqlens_k.copy_(_running_sums(lengths))
    rows_per_request = accepted.tolist()  # waits for the device
    slots = args.req_to_token[args.req_pool_indices, :longest]
    rows = torch.repeat_interleave(slots, accepted, dim=0)  # waits for the device again
    args.page_table_1[:, :longest].copy_(rows)
    expanded = torch.cat(
        [
            torch.arange(length - q + 1, length + 1, dtype=torch.int32, device=args.device)
            for length, q in zip(host_lengths.tolist(), rows_per_request, strict=True)
        ]
    )
    args.seqlens_expanded.copy_(expanded)
    args.nsa_cache_seqlens.copy_(expanded.clamp(max=args.index_topk))
    args.nsa_cu_seqlens_k.copy_(_running_sums(args.nsa_cache_seqlens))
    pages = args.page_table_1[:, : longest : args.page_size] // args.page_size
    args.real_page_table[:, : pages.shape[1]].copy_(pages)


def _running_sums(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(values, dim=0, dtype=torch.int32), (1, 0))
