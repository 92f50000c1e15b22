"""SGLang's own one-kernel fill of draft-extend metadata (0.5.15 and later), called directly."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.harness.inputs import Inputs

# Where releases keep fused_dsa_draft_extend_metadata, newest first.
FUSED_FILL_MODULES = (
    "sglang.kernels.ops.attention.dsa.metadata",  # 0.5.23
    "sglang.kernels.ops.attention.dsa_metadata",  # 0.5.16 to 0.5.22
    "sglang.srt.layers.attention.triton_ops.dsa_metadata",  # 0.5.15
)


def sglang_fused_fill(
    metadata: Any, inputs: Inputs, bs: int, draft_tokens: int, index_topk: int, page_size: int
) -> None:
    """SGLang's one-kernel fill, which it uses on CUDA, into the tensors of a DSAMetadata.

    On CPU tensors Triton's interpreter runs it.
    """
    fill = fused_fill()
    device = inputs.seq_lens.device
    launch = fill
    if device.type == "cpu":
        process_stubs.validate_interpreter()
        launch = process_stubs.on_cpu(fill)
    rows = bs * draft_tokens
    page_table_1 = metadata.page_table_1
    is_renamed = "real_page_size" in process_stubs.parameters(fill)  # since 0.5.22
    page = "real_page_size" if is_renamed else "physical_page_size"
    launch(
        seq_lens=inputs.seq_lens[:bs],
        extend_seq_lens=torch.full((bs,), draft_tokens, dtype=torch.int32, device=device),
        req_pool_indices=inputs.req_pool_indices[:bs],
        req_to_token=inputs.req_to_token,
        cache_seqlens=metadata.cache_seqlens_int32,
        cu_seqlens_k=metadata.cu_seqlens_k,
        page_table_1=page_table_1,
        seqlens_expanded=metadata.dsa_seqlens_expanded,
        dsa_cache_seqlens=metadata.dsa_cache_seqlens_int32,
        dsa_cu_seqlens_k=metadata.dsa_cu_seqlens_k,
        real_page_table=metadata.real_page_table,
        bs=bs,
        total_len=rows,
        max_seqlen_k=(inputs.req_to_token if page_table_1 is None else page_table_1).shape[1],
        dsa_index_topk=index_topk,
        max_extend_len=draft_tokens,
        max_total_len=rows,
        static_extend_len=True,
        **{page: page_size},
    )


def fused_fill() -> Callable[..., None]:
    """``fused_dsa_draft_extend_metadata``, wherever this release keeps it."""
    for name in FUSED_FILL_MODULES:
        try:
            fill: Callable[..., None] = importlib.import_module(name).fused_dsa_draft_extend_metadata
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise
        else:
            return fill
    from sglang.version import __version__ as version

    raise RuntimeError(
        f"sglang {version}: has no fused_dsa_draft_extend_metadata in any of "
        f"{', '.join(FUSED_FILL_MODULES)}; releases from 0.5.15 on have it"
    )
