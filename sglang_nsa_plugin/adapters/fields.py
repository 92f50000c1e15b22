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
# Of a model with a pooled index, by our names in KPoolArgs: where SGLang has the tensor, in one role or
# another. Its lengths ``nsa_...`` are the fields of a fill without k-pooling.
KPOOL_PLAN = "kpool_write_plan"
KPOOL = {
    "write_requests": (f"{KPOOL_PLAN}.req",),
    "write_start": (f"{KPOOL_PLAN}.write_start",),
    "tail_start": (f"{KPOOL_PLAN}.tail_logical_start",),
    "write_locs": (f"{KPOOL_PLAN}.write_loc",),
    "write_counts": (f"{KPOOL_PLAN}.effective_n_per_batch",),
    "row_seqlens": (f"{KPOOL_PLAN}.seqlens_per_q",),
    "kpool_seqlens": ("pooled_cache_seqlens_int32", f"{KPOOL_PLAN}.pool_seqlens_per_q"),
    "kpool_page_table": ("pooled_real_page_table",),
    "kpool_schedule": (
        "pooled_paged_mqa_schedule_metadata",
        f"{KPOOL_PLAN}.pool_schedule_metadata",
    ),
}
KPOOL_TOPK_PLAN = ("pooled_topk_v2_plan", f"{KPOOL_PLAN}.pool_topk_v2_plan")  # since 0.5.23
_KNOWN_KPOOL = frozenset(
    (KPOOL_PLAN, *KPOOL_TOPK_PLAN, *(name for each in KPOOL.values() for name in each))
)


def unknown_on_device(metadata: Any, is_pooled: bool = False) -> list[str]:
    """SGLang's fields that the plugin does not know and that hold more than a number or a name.

    A graph may read them, and SGLang may write them before each replay.
    """
    known = _KNOWN | _KNOWN_KPOOL if is_pooled else _KNOWN
    values = {each.name: getattr(metadata, each.name) for each in dataclasses.fields(metadata)}
    if is_pooled and dataclasses.is_dataclass(values.get(KPOOL_PLAN)):
        plan = values[KPOOL_PLAN]
        values |= {f"{KPOOL_PLAN}.{f.name}": getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return [
        name for name, value in values.items() if name not in known and not isinstance(value, _PLAIN)
    ]


def graph_key(table: Mapping[Any, Any], batch_size: int, mode: Any) -> Any:
    """SGLang's key for the metadata of a batch size: the size, or the size and the ForwardMode."""
    with_mode = (batch_size, mode)
    return with_mode if with_mode in table else batch_size


def read(metadata: Any, fields: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """The tensors of SGLang's metadata object by our names; None where the release has no such field."""
    return {name: getattr(metadata, fields[name], None) for name in names}


def read_kpool(metadata: Any) -> dict[str, Any]:
    """The tensors of a k-pooling fill by our names: those that this role and release have."""
    found = {name: first_of(metadata, paths) for name, paths in KPOOL.items()}
    found |= read(metadata, DSA, ("nsa_cache_seqlens", "nsa_cu_seqlens_k"))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def first_of(metadata: Any, paths: Iterable[str]) -> Any:
    """What SGLang has at the one of these places that is in use, or None."""
    found = [value for path in paths if (value := at(metadata, path)) is not None]
    if len(found) > 1:
        raise ValueError(f"{', '.join(paths)}: one of them must be None")
    return found[0] if found else None


def at(metadata: Any, path: str) -> Any:
    """The value at a dotted path; None where a part of it is None or missing."""
    for name in path.split("."):
        metadata = getattr(metadata, name, None)
    return metadata


def tokens_per_column(table: str, page_size: int) -> int:
    """How many tokens a column of a page table stands for."""
    return 1 if table == "page_table_1" else page_size
