"""An SGLang plugin that lets FlashMLA's sparse attention serve a model with a pooled index.

On Hopper GPUs SGLang 0.5.20 and later take FA3 for such a model, whose library is too large for some
test hosts. FlashMLA wants tables of a multiple of 128 columns; those of a pooled index have k - 1 more
than the top-k, for the tokens behind the last k-pool. Here they get columns of -1, which is no token.
Metadata, memory pool, indexer and graphs are SGLang's. Used by test_kpool.py only, in all its servers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
ATTENTION = "sglang.srt.layers.attention"
POOLED = f"{ATTENTION}.dsa.dsa_backend_kpool.DeepseekSparseAttnBackendKPoolMixin"
BACKEND = f"{ATTENTION}.dsa_backend.DeepseekSparseAttnBackend"
COLUMNS = 128  # FlashMLA's sparse kernel takes a multiple of it
NO_TOKEN = -1


def register() -> None:
    """Called by SGLang's plugin loader; the launcher runs no attention."""
    if SCHEDULER_MODULE not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{POOLED}._resolve_kpool_tail_backend", as_asked, HookType.AROUND)
    HookRegistry.register(f"{POOLED}._check_kpool_tail_backend", accepted, HookType.AROUND)
    HookRegistry.register(f"{BACKEND}._forward_flashmla_sparse", widened, HookType.AROUND)


def as_asked(original: Callable[..., str], backend: Any, topk_indices: Any, dsa_impl: str) -> str:
    """The attention of the server's options, also where SGLang takes another one."""
    return dsa_impl


def accepted(original: Callable[..., None], backend: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang refuses FlashMLA here."""


def widened(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """FlashMLA's attention over a table that has columns of no token behind its own."""
    call = inspect.signature(original).bind(*args, **kwargs)
    table = call.arguments["page_table_1"]
    more = -table.shape[-1] % COLUMNS
    call.arguments["page_table_1"] = _with_columns(table, more) if more else table
    return original(*call.args, **call.kwargs)


def _with_columns(table: Any, count: int) -> Any:
    import torch

    return torch.nn.functional.pad(table, (0, count), value=NO_TOKEN)
