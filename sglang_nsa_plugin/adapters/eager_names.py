"""What SGLang calls the things that the eager adapter uses: NSA was renamed to DSA in 0.5.13."""

from __future__ import annotations

import importlib.util

CTX_LENS = "paged_mqa_ctx_lens_2d"  # a field of the metadata object since 0.5.13
_SHARED_FIELDS = (
    "page_size",
    "cache_seqlens_int32",
    "max_seq_len_q",
    "max_seq_len_k",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "page_table_1",
    "real_page_table",
    "flashmla_metadata",
    "paged_mqa_schedule_metadata",
    "seq_lens_sum",
    "page_table_1_flattened",
    "topk_indices_offset",
    "indexer_k_start_end",
    "indexer_seq_lens_cpu",
    "indexer_seq_lens",
    "token_to_batch_idx",
)


class Names:
    """The names of one generation, by what they name."""

    def __init__(self, prefix: str, backend: str) -> None:
        self.prefix = prefix
        self.package = f"sglang.srt.layers.attention.{prefix}"
        self.module = f"{self.package}_backend"
        self.backend = f"{self.module}.{backend}"
        self.metadata = f"{prefix.upper()}Metadata"
        self.index_topk = f"{prefix}_index_topk"
        self.decode_impl = f"{prefix}_decode_impl"
        self.set_prefill_impl = f"set_{prefix}_prefill_impl"
        self.cache_seqlens = f"{prefix}_cache_seqlens_int32"
        self.cu_seqlens_q = f"{prefix}_cu_seqlens_q"
        self.cu_seqlens_k = f"{prefix}_cu_seqlens_k"
        self.extend_seq_lens_list = f"{prefix}_extend_seq_lens_list"
        self.seqlens_expanded = f"{prefix}_seqlens_expanded"
        self.max_seqlen_q = f"{prefix}_max_seqlen_q"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the metadata object in every release of the generation."""
        return (
            *_SHARED_FIELDS,
            self.cache_seqlens,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.extend_seq_lens_list,
            self.seqlens_expanded,
            self.max_seqlen_q,
        )


NSA = Names("nsa", "NativeSparseAttnBackend")  # 0.5.11 and 0.5.12
DSA = Names("dsa", "DeepseekSparseAttnBackend")  # 0.5.13 and 0.5.14


def names_of_generation() -> Names:
    """Those of the installed SGLang."""
    return NSA if importlib.util.find_spec(DSA.module) is None else DSA
