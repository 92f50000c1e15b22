"""A server that releases the memory of its CUDA graphs, and the shadow check.

From 0.5.22 on, SGLang lets go of FlashMLA's plans and the wide page tables with that memory, and they
come back as zeros. The last replay before is not compared any more: it would differ.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from sglang_nsa_plugin.adapters import hooks, taken_over
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.hooks import Hook
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import logger_of, loses

logger = logger_of(__name__)

_MODULE = "sglang.srt.managers.scheduler_components.weight_updater"  # since 0.5.14


def install(requests: Iterable[Request]) -> None:
    """Hooks the release where fills are checked; if that is not possible, says what may come of it."""
    if not any(request.check_every for request in requests) or not _has_module():
        return
    why_not = hooks.apply_now(HOOK)
    if why_not is not None:
        logger.warning(
            "sglang-nsa-plugin: %s. If this server releases the memory of its CUDA graphs, the shadow "
            "check may report a difference that is none",
            why_not,
        )


def _has_module() -> bool:
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:
        return False


def _release(original: Callable[..., Any], updater: Any, recv_req: Any, *more: Any, **named: Any) -> Any:
    attempt(taken_over.drop_last_checks, loses("that comparisons are left out"))
    return original(updater, recv_req, *more, **named)


HOOK = Hook(
    f"{_MODULE}.SchedulerWeightUpdaterManager.release_memory_occupation", ("self", "recv_req"), _release
)
