"""What SGLang calls the tensors that a fill writes: our names in FillArgs, its fields in the metadata.

SGLang renamed NSA to DSA in 0.5.13. A release may lack a field (``paged_mqa_ctx_lens_2d`` came with
0.5.13), and a configuration may leave one None.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any

# Our names by kind, in the order in which tensors are compared.
LENGTHS = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
TABLES = ("page_table_1", "real_page_table")
# What SGLang's own functions derive from the lengths.
TOPK_PLAN, FLASHMLA = "topk_v2_plan", "flashmla_metadata"


def _fields(prefix: str) -> dict[str, str]:
    return {
        "cache_seqlens": "cache_seqlens_int32",
        "cu_seqlens_k": "cu_seqlens_k",
        "seqlens_expanded": f"{prefix}_seqlens_expanded",
        "nsa_cache_seqlens": f"{prefix}_cache_seqlens_int32",
        "nsa_cu_seqlens_k": f"{prefix}_cu_seqlens_k",
        "ctx_lens": "paged_mqa_ctx_lens_2d",
        "page_table_1": "page_table_1",
        "real_page_table": "real_page_table",
        "mqa_schedule": "paged_mqa_schedule_metadata",
    }


NSA = _fields("nsa")  # 0.5.11 and 0.5.12
DSA = _fields("dsa")  # 0.5.13 and later
# What a replay of a speculative step leaves as it was captured. Other fields of SGLang's are None there.
LEFT_AS_CAPTURED = ("cu_seqlens_q", "dsa_cu_seqlens_q", "dsa_extend_seq_lens_list")
_PLAIN = (type(None), bool, int, float, str, enum.Enum)
_KNOWN = frozenset((*DSA.values(), TOPK_PLAN, FLASHMLA, *LEFT_AS_CAPTURED))


def unknown_on_device(metadata: Any) -> list[str]:
    """SGLang's fields that the plugin does not know and that hold more than a number or a name.

    A graph may read them, and SGLang may write them before each replay.
    """
    unknown = [each.name for each in dataclasses.fields(metadata) if each.name not in _KNOWN]
    return [name for name in unknown if not isinstance(getattr(metadata, name), _PLAIN)]


def graph_key(table: Mapping[Any, Any], batch_size: int, mode: Any) -> Any:
    """SGLang's key for the metadata of a batch size: the size, or the size and the ForwardMode."""
    with_mode = (batch_size, mode)
    return with_mode if with_mode in table else batch_size


def read(metadata: Any, fields: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """The tensors of SGLang's metadata object by our names; None where the release has no such field."""
    return {name: getattr(metadata, fields[name], None) for name in names}


def tokens_per_column(table: str, page_size: int) -> int:
    """How many tokens a column of a page table stands for."""
    return 1 if table == "page_table_1" else page_size
