"""The wide page tables, which graphs of a speculative step do without where nothing reads them.

SGLang leaves ``page_table_1`` out of decode graphs whose top-k reads the paged table, but never with
speculation. Draft-extend, draft-decode and verify run the same attention and read it no more than
those do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.adapter import Takeover
from sglang_nsa_plugin.adapters.hooks import Sets
from sglang_nsa_plugin.log import logger_of
from sglang_nsa_plugin.state import VERSION

logger = logger_of(__name__)

INT32_BYTES = 4

_ALLOCATES = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend.init_cuda_graph_state"


def can_be_dropped() -> bool:
    """Whether this SGLang decides about wide tables, as 0.5.15 and later do. Others read them."""
    return not hooks.misfits([Sets(_ALLOCATES, ("dsa_drop_wide_page_table",))])


@contextlib.contextmanager
def decided_without_speculation(backends: Iterable[Any]) -> Iterator[None]:
    """While these backends allocate, SGLang asks its own conditions for a wide table, but for this one.

    The other conditions, such as the choice of the top-k kernel, stay SGLang's.
    """
    draft_tokens = [(backend, backend.speculative_num_draft_tokens) for backend in backends]
    for backend, _ in draft_tokens:
        backend.speculative_num_draft_tokens = None
    try:
        yield
    finally:
        for backend, tokens in draft_tokens:
            backend.speculative_num_draft_tokens = tokens


def is_dropped(backend: Any) -> bool:
    """Whether SGLang left the wide table of this backend's graphs out."""
    return getattr(backend, "decode_cuda_graph_metadata", {}).get("page_table", 0) is None


def restore(backend: Any) -> None:
    """Makes draft-decode's wide table that was left out, for SGLang's fill of all draft steps.

    That fill copies the table for the graphs, which were captured without it and do not read it.

    Raises:
        RuntimeError: the GPU has no memory left for it.
    """
    if not is_dropped(backend):
        return
    graphs = backend.decode_cuda_graph_metadata.values()
    captured = [metadata for metadata in graphs if hasattr(metadata, "page_table_1")]
    sizes = [metadata.cache_seqlens_int32.shape[0] for metadata in captured]
    shape = max(sizes, default=0), backend.req_to_token.shape[1]
    try:
        table = torch.zeros(shape, dtype=torch.int32, device=backend.req_to_token.device)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            "sglang-nsa-plugin: another plugin replaced a hook of draft-decode after its graphs were "
            f"captured. SGLang's own fill needs {bytes_of(backend, shape[0])} bytes for a page table, "
            f"and the GPU has no memory left. Start with {options.WIDE_FLAG} {options.KEEP}"
        ) from error
    for size, metadata in zip(sizes, captured, strict=True):
        object.__setattr__(metadata, "page_table_1", table[:size])


def bytes_of(backend: Any, rows: int) -> int:
    """The size of a wide table with so many rows: ``rows * req_to_token.shape[1]`` int32 numbers."""
    return rows * int(backend.req_to_token.shape[1]) * INT32_BYTES


def report_savings(scheduler: Any, takeovers: Iterable[Takeover]) -> None:
    """Logs what the filled roles save of the GPU's memory, and how it would become KV cache."""
    filled = [each for each in takeovers if each.outcome.state.in_place]
    saved = sum(each.outcome.state.bytes_saved for each in filled)
    if not saved:
        return
    backends = [_first(owner) for each in filled for owner in each.backends]
    kept = sum(_bytes_kept(backend) for backend in backends)
    pools = [_target_pool(scheduler), *(backend.token_to_kv_pool for backend in backends)]
    per_token = sum(pool.get_kv_size_bytes() / pool.size for pool in {id(p): p for p in pools}.values())
    _, of_gpu = torch.cuda.mem_get_info()
    logger.info(
        "sglang-nsa-plugin %s: page tables of the graphs take %d MB instead of %d MB, because nothing "
        "reads the others. That is %d tokens of KV cache, if you raise --mem-fraction-static by %.4f",
        VERSION,
        kept // 1_000_000,
        (kept + saved) // 1_000_000,
        saved // per_token,
        saved / of_gpu,
    )


def _first(owner: Any) -> Any:
    """The backend that holds the graphs' tensors: of the first draft step, or the owner itself."""
    return owner.attn_backends[0] if hasattr(owner, "attn_backends") else owner


def _bytes_kept(backend: Any) -> int:
    """The size of the page tables of this backend's graphs, of which each batch size has a slice."""
    held = backend.decode_cuda_graph_metadata
    tables = [held.get(name) for name in ("page_table", "real_page_table")]
    for captured in held.values():
        tables += [getattr(captured, name, None) for name in ("page_table_1", "real_page_table")]
    storages = [table.untyped_storage() for table in tables if table is not None]
    return sum({each.data_ptr(): int(each.nbytes()) for each in storages}.values())


def _target_pool(scheduler: Any) -> Any:
    return scheduler.tp_worker.model_runner.token_to_kv_pool
