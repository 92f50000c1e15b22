"""Which adapter the installed SGLang would get, by its source: SGLang is not imported."""

from __future__ import annotations

from typing import Any

from sglang_nsa_plugin.cli.source_stubs import outline


def ask() -> dict[str, Any]:
    """``name`` of the adapter of this generation, and its ``misfits``, none when it fits."""
    from sglang_nsa_plugin import adapters
    from sglang_nsa_plugin.adapters import hooks

    with outline("sglang"):
        adapter = adapters.of_generation()
        return {
            "name": adapter.NAME,
            "misfits": hooks.misfits((*adapter.HOOKS, *adapter.NEEDS)),
        }
