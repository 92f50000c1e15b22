"""A second SGLang plugin that hooks the scheduler's constructor and does not leave the rest to SGLang.

With this folder ahead on PYTHONPATH, SGLang finds the entry point ``first`` before sglang-nsa-plugin's.
Its hook changes nothing. But it calls ``apply_hooks()`` in its own ``register()``, as some public
plugins do, and SGLang then skips every later hook on the same target. Used by test_other_plugin.py only.
"""

from __future__ import annotations

from typing import Any

TARGET = "sglang.srt.managers.scheduler.Scheduler.__init__"


def register() -> None:
    """Called by SGLang's plugin loader."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, _as_it_is, HookType.AROUND)
    HookRegistry.apply_hooks()


def _as_it_is(original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
