"""SGLang's own one-kernel fill as an oracle; Triton's interpreter runs it on CPU tensors."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cases import POISON

from sglang_nsa_plugin import FillArgs

# Where releases keep it, newest first: 0.5.23; 0.5.16 to 0.5.22; 0.5.15.
MODULES = (
    "sglang.kernels.ops.attention.dsa.metadata",
    "sglang.kernels.ops.attention.dsa_metadata",
    "sglang.srt.layers.attention.triton_ops.dsa_metadata",
)


@functools.cache
def kernel() -> Callable[..., None]:
    """Skips the calling test where SGLang is missing or older than this kernel."""
    sglang = pytest.importorskip("sglang", reason="needs SGLang, whose own kernel is the oracle")
    for name in MODULES:
        try:
            found: Callable[..., None] = importlib.import_module(name).fused_dsa_draft_extend_metadata
        except ModuleNotFoundError:
            continue
        return found
    pytest.skip(f"SGLang {sglang.__version__} has no fused draft-extend kernel; 0.5.15 and later have")


def fill(args: FillArgs) -> dict[str, torch.Tensor]:
    """What SGLang writes for a batch without spare rows, in tensors of its own."""
    out = {
        name: torch.full(tensor.shape, POISON, dtype=torch.int32, device=args.device)
        for name, tensor in args.outputs().items()
    }
    uniform = isinstance(args.extend_lens, int)
    extend_lens = torch.full_like(args.seq_lens, args.extend_lens) if uniform else args.extend_lens
    launch = kernel()
    # Renamed in 0.5.22.
    names = inspect.signature(launch).parameters
    page = "real_page_size" if "real_page_size" in names else "physical_page_size"
    with mock.patch.object(torch.Tensor, "is_cuda", True):  # it asserts CUDA tensors
        launch(
            seq_lens=args.seq_lens,
            extend_seq_lens=extend_lens,
            req_pool_indices=args.req_pool_indices,
            req_to_token=args.req_to_token,
            cache_seqlens=out["cache_seqlens"],
            cu_seqlens_k=out["cu_seqlens_k"],
            page_table_1=out.get("page_table_1"),
            seqlens_expanded=out["seqlens_expanded"],
            dsa_cache_seqlens=out["nsa_cache_seqlens"],
            dsa_cu_seqlens_k=out["nsa_cu_seqlens_k"],
            real_page_table=out.get("real_page_table"),
            bs=args.bs,
            total_len=args.rows,
            max_seqlen_k=_columns(args),
            dsa_index_topk=args.index_topk,
            max_extend_len=int(extend_lens.max()),
            max_total_len=args.rows,
            static_extend_len=uniform,
            **{page: args.page_size},
        )
    return out


def _columns(args: FillArgs) -> int:
    """Tokens of a request that the tables have room for."""
    if args.page_table_1 is not None:
        return args.page_table_1.shape[1]
    return min(args.req_to_token.shape[1], args.real_page_table.shape[1] * args.page_size)
