"""SGLang's own one-kernel fills as oracles; Triton's interpreter runs them on CPU tensors."""

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

# Where releases keep them, newest first: 0.5.23; 0.5.16 to 0.5.22; 0.5.15.
MODULES = (
    "sglang.kernels.ops.attention.dsa.metadata",
    "sglang.kernels.ops.attention.dsa_metadata",
    "sglang.srt.layers.attention.triton_ops.dsa_metadata",
)


@functools.cache
def kernel(role: str = "draft_extend") -> Callable[..., None]:
    """Of the role draft_extend, target_verify or decode.

    Skips the calling test where SGLang is missing or older than these kernels.
    """
    sglang = pytest.importorskip("sglang", reason="needs SGLang, whose own kernel is the oracle")
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        found: Callable[..., None] = getattr(module, f"fused_dsa_{role}_metadata")
        return found
    pytest.skip(f"SGLang {sglang.__version__} has no fused kernels of metadata; 0.5.15 and later have")


def fill(args: FillArgs) -> dict[str, torch.Tensor]:
    """What SGLang writes for draft-extend of a batch without spare rows, in tensors of its own."""
    uniform = isinstance(args.extend_lens, int)
    extend_lens = torch.full_like(args.seq_lens, args.extend_lens) if uniform else args.extend_lens
    return _launch(
        args,
        "draft_extend",
        extend_seq_lens=extend_lens,
        total_len=args.rows,
        max_seqlen_k=_columns(args),
        max_extend_len=int(extend_lens.max()),
        max_total_len=args.rows,
        static_extend_len=uniform,
    )


def fill_target_verify(args: FillArgs) -> dict[str, torch.Tensor]:
    """The same for target-verify, which adds its draft tokens to the lengths."""
    assert args.extend_lens == args.length_offset
    return _launch(args, "target_verify", max_seqlen_k=_columns(args), next_n=args.extend_lens)


def fill_decode(args: FillArgs) -> dict[str, torch.Tensor]:
    """The same for decode, where ``cache_seqlens`` are the expanded lengths, too."""
    assert (args.extend_lens, args.length_offset, args.seqlens_expanded) == (1, 0, None)
    return _launch(args, "decode", max_len=_columns(args))


def _launch(args: FillArgs, role: str, **sizes: object) -> dict[str, torch.Tensor]:
    out = {
        name: torch.full(tensor.shape, POISON, dtype=torch.int32, device=args.device)
        for name, tensor in args.outputs().items()
    }
    launch = kernel(role)
    # Renamed in 0.5.22.
    names = inspect.signature(launch).parameters
    page = "real_page_size" if "real_page_size" in names else "physical_page_size"
    if "seqlens_expanded" in out:
        sizes["seqlens_expanded"] = out["seqlens_expanded"]
    with mock.patch.object(torch.Tensor, "is_cuda", True):  # it asserts CUDA tensors
        launch(
            seq_lens=args.seq_lens,
            req_pool_indices=args.req_pool_indices,
            req_to_token=args.req_to_token,
            cache_seqlens=out["cache_seqlens"],
            cu_seqlens_k=out["cu_seqlens_k"],
            page_table_1=out.get("page_table_1"),
            dsa_cache_seqlens=out["nsa_cache_seqlens"],
            dsa_cu_seqlens_k=out["nsa_cu_seqlens_k"],
            real_page_table=out.get("real_page_table"),
            bs=args.bs,
            dsa_index_topk=args.index_topk,
            **{page: args.page_size},
            **sizes,
        )
    return out


def _columns(args: FillArgs) -> int:
    """Tokens of a request that the tables have room for."""
    if args.page_table_1 is not None:
        return args.page_table_1.shape[1]
    return min(args.req_to_token.shape[1], args.real_page_table.shape[1] * args.page_size)
