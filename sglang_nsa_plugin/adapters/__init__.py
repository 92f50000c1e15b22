"""How the fill is hooked into SGLang: one adapter for each generation of its code."""

from __future__ import annotations

from typing import Any

from sglang_nsa_plugin.adapters import hooks, in_graph

SPARSE_ATTENTION = ("dsa", "nsa")
_BACKEND_ARGUMENTS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)


def nothing_to_fill(server_args: Any) -> str | None:
    """Why a server with these arguments has no draft-extend metadata, or None when it has."""
    if getattr(server_args, "speculative_algorithm", None) is None:
        return "no speculative decoding, so there is no draft-extend metadata"
    backends = {str(getattr(server_args, name, None)) for name in _BACKEND_ARGUMENTS} - {"None"}
    if not backends.intersection(SPARSE_ATTENTION):
        return f"attention backend {', '.join(sorted(backends))} is not NSA/DSA sparse attention"
    return None


def install(backend: str) -> str | None:
    """Hooks the adapter that fits the installed SGLang; returns why not when none does."""
    misfits = hooks.misfits((*in_graph.HOOKS, *in_graph.NEEDS))
    if misfits:
        return f"this SGLang does not fit the {in_graph.NAME} adapter: {'; '.join(misfits)}"
    not_applied = hooks.install(in_graph.HOOKS)
    if not_applied:
        return f"another plugin patched {', '.join(not_applied)} before"
    in_graph.arm(backend)
    return None
