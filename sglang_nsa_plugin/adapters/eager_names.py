"""What SGLang calls the things that the eager adapter uses: NSA was renamed to DSA in 0.5.13."""

from __future__ import annotations

import importlib.util

from sglang_nsa_plugin.adapters import fields

# Fields of the metadata object that kept their names, beside the outputs of a fill.
_OTHER_FIELDS = (
    "page_size",
    "max_seq_len_q",
    "max_seq_len_k",
    "cu_seqlens_q",
    "flashmla_metadata",
    "seq_lens_sum",
    "page_table_1_flattened",
    "topk_indices_offset",
    "indexer_k_start_end",
    "indexer_seq_lens_cpu",
    "indexer_seq_lens",
    "token_to_batch_idx",
)


class SglangNames:
    """The names of one generation, by what they name.

    Attributes:
        outputs: the metadata fields that a fill writes, by our names.
    """

    def __init__(self, prefix: str, backend: str, outputs: dict[str, str]) -> None:
        self.prefix = prefix
        self.outputs = outputs
        self.package = f"sglang.srt.layers.attention.{prefix}"
        self.module = f"{self.package}_backend"
        self.backend = f"{self.module}.{backend}"
        self.metadata = f"{prefix.upper()}Metadata"
        self.index_topk = f"{prefix}_index_topk"
        self.decode_impl = f"{prefix}_decode_impl"
        self.set_prefill_impl = f"set_{prefix}_prefill_impl"
        self.nsa_cu_seqlens_q = f"{prefix}_cu_seqlens_q"
        self.nsa_max_seqlen_q = f"{prefix}_max_seqlen_q"
        self.nsa_extend_seq_lens_list = f"{prefix}_extend_seq_lens_list"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the metadata object in every release of the generation."""
        written = [field for name, field in self.outputs.items() if name != "ctx_lens"]
        renamed = (self.nsa_cu_seqlens_q, self.nsa_max_seqlen_q, self.nsa_extend_seq_lens_list)
        return (*written, *_OTHER_FIELDS, *renamed)


NSA = SglangNames("nsa", "NativeSparseAttnBackend", fields.NSA)  # 0.5.11 and 0.5.12
DSA = SglangNames("dsa", "DeepseekSparseAttnBackend", fields.DSA)  # 0.5.13 and 0.5.14


def names_of_generation() -> SglangNames:
    """Those of the installed SGLang."""
    return NSA if importlib.util.find_spec(DSA.module) is None else DSA
