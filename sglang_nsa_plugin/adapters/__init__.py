"""How the fill is hooked into SGLang: one adapter for each generation of its code."""

from __future__ import annotations

import logging
from typing import Any

from sglang_nsa_plugin.adapters import eager, hooks, in_graph, releases
from sglang_nsa_plugin.adapters.server_config import resolved
from sglang_nsa_plugin.state import STATE

logger = logging.getLogger(__name__)

SPARSE_ATTENTION = ("dsa", "nsa")
_BACKEND_ARGUMENTS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)


def nothing_to_fill(server_args: Any) -> str | None:
    """Why a server with these arguments has no draft-extend metadata, or None when it has."""
    arguments = resolved(server_args)
    if getattr(arguments, "speculative_algorithm", None) is None:
        return "no speculative decoding, so there is no draft-extend metadata"
    backends = {str(getattr(arguments, name, None)) for name in _BACKEND_ARGUMENTS} - {"None"}
    if not backends.intersection(SPARSE_ATTENTION):
        return f"attention backend {', '.join(sorted(backends))} is not NSA/DSA sparse attention"
    return None


def of_generation() -> Any:
    """The one adapter that was written for code like that of the installed SGLang."""
    return in_graph if in_graph.is_generation() else eager.of_generation()


def install(backend: str, check_every: int) -> str | None:
    """Hooks the adapter of the installed SGLang's generation; returns why not when it does not fit.

    A generation is told by what SGLang has. Only its own adapter is tried: one that was written for
    other code may seem to fit and fill tensors that nobody reads. With ``check_every`` of 0 nothing is
    shadow-checked.
    """
    adapter = of_generation()
    misfits = hooks.misfits((*adapter.HOOKS, *adapter.NEEDS))
    if misfits:
        return f"this SGLang does not fit the {adapter.NAME} adapter: {'; '.join(misfits)}"
    not_applied = hooks.install(adapter.HOOKS)
    if not_applied:
        return f"another plugin patched {', '.join(not_applied)} before"
    _warn_of_untested_release()
    adapter.arm(backend, check_every)
    STATE.adapter, STATE.reason = adapter.NAME, "waiting for the draft-extend backend"
    return None


def _warn_of_untested_release() -> None:
    import sglang

    warning = releases.untested(sglang.__version__)
    if warning is not None:
        logger.warning("sglang-nsa-plugin: %s", warning)
