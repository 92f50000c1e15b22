"""The entry point: decides whether this process fills draft-extend metadata, and says so in one line.

SGLang calls :func:`register` in the main process before it parses arguments, and again in each
scheduler process. Only the scheduler needs SGLang's GPU modules, so the adapter is installed there,
when the Scheduler is made; registering imports none of them and starts no CUDA context.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.state import record

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
RECORD_KEY = "nsa_metadata"


@functools.cache
def register() -> None:
    """Called by SGLang's ``load_plugins()`` through the entry point ``sglang.srt.plugins``.

    A second call changes nothing: flags that are added twice would end the start.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    options.check_environment()
    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", options.add_flags, HookType.AROUND)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", _from_cli_args, HookType.AROUND)
    # A spawned scheduler process has the module loaded when it loads plugins; elsewhere it may stay
    # unloaded.
    if _SCHEDULER_MODULE in sys.modules:
        HookRegistry.register(f"{_SCHEDULER}.__init__", _before_scheduler, HookType.BEFORE)
        HookRegistry.register(f"{_SCHEDULER}.__init__", _after_scheduler, HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.get_internal_state", _add_record, HookType.AFTER)
    _export_to_sgl_kernel()


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    from sglang_nsa_plugin.kernels import cuda

    server_args = options.keep_flags(original, cls, args)
    backend = options.backend_of(server_args)
    if backend == "cuda":
        _end_if(f"{options.FLAG} cuda", cuda.why_unavailable())
    if backend != "off" and options.check_of(server_args):
        _end_if(options.CHECK_FLAG, cuda.why_unavailable())
    _export_to_sgl_kernel()
    logger.info(
        "sglang-nsa-plugin %s: metadata backend %s, set up in each scheduler process",
        version("sglang-nsa-plugin"),
        backend,
    )
    return server_args


def _end_if(asked_for: str, why_not: str | None) -> None:
    """The launcher knows without a GPU that a library is missing; ranks need not start for that."""
    if why_not is not None:
        raise SystemExit(f"sglang-nsa-plugin: {asked_for} cannot run: {why_not}")


def _before_scheduler(scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    activate(server_args)


def _after_scheduler(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """With ``--enable-metrics`` a scheduler has a collector, whose labels name its rank."""
    collector = getattr(scheduler, "metrics_collector", None)
    if collector is not None:
        from sglang_nsa_plugin import metrics

        metrics.export(collector.labels)


def activate(server_args: Any) -> None:
    """Installs the adapter for a server with these arguments, or says why SGLang fills itself.

    Raises:
        BackendUnavailableError: a backend was asked for by name and no adapter fits this SGLang.
    """
    from sglang_nsa_plugin import adapters
    from sglang_nsa_plugin.adapters.outcome import decline, step_aside

    _export_to_sgl_kernel()
    backend = options.backend_of(server_args)
    nothing_to_do = "switched off" if backend == "off" else adapters.nothing_to_fill(server_args)
    if nothing_to_do is not None:
        step_aside(nothing_to_do)
        return
    why_not = adapters.install(backend, options.check_of(server_args))
    if why_not is not None:
        decline(backend, why_not)


def _export_to_sgl_kernel() -> None:
    """Callers of SGLang's kernels find the two plain functions beside them, where those are loaded."""
    sgl_kernel = sys.modules.get("sgl_kernel")
    if sgl_kernel is None:
        return

    from sglang_nsa_plugin import api

    for name in ("fill_draft_extend_metadata_cuda", "fill_draft_extend_metadata_cuda_adaptive"):
        setattr(sgl_kernel, name, getattr(api, name))


def _add_record(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """After ``Scheduler.get_internal_state``: ``/server_info`` shows what this rank does."""
    result.internal_state[RECORD_KEY] = record()
    return result
