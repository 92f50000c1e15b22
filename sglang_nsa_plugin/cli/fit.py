"""Which adapter the installed SGLang would get, by its source: SGLang is not imported."""

from __future__ import annotations

from typing import Any

from sglang_nsa_plugin.cli.source_stubs import outline


def ask() -> dict[str, Any]:
    """``name`` of the adapter of this generation, and its ``misfits``, none when it fits."""
    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.install import adapter_for_installed

    with outline("sglang"):
        adapter = adapter_for_installed()
        return {"name": adapter.name, "misfits": hooks.misfits(adapter.requirements)}
