"""The entry point: decides whether this process fills draft-extend metadata, and logs it in one line.

SGLang calls :func:`register` in the main process before it parses arguments, and again in each
scheduler process. Only the scheduler needs SGLang's GPU modules, so the adapter is installed when the
Scheduler is made. Registering imports none of them and starts no CUDA context.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.hooks import Hook
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import logger_of, loses
from sglang_nsa_plugin.state import VERSION, record

logger = logger_of(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
RECORD_KEY = "nsa_metadata"


@functools.cache
def register() -> None:
    """Called by SGLang's ``load_plugins()`` through the entry point ``sglang.srt.plugins``.

    A second call changes nothing: a flag that is added twice would end the start.
    """
    try:
        options.validate_environment()
    except SystemExit as error:
        logger.error("%s", error)  # a SystemExit ends a thread that loads plugins without a word
        raise
    for hook in _hooks_of_process():
        misfits = hooks.misfits([hook])
        if misfits:
            logger.warning("sglang-nsa-plugin: this SGLang does not fit: %s", misfits[0])
        else:
            hooks.register([hook])
    _export_to_sgl_kernel()


def _hooks_of_process() -> tuple[Hook, ...]:
    """The command line's in every process; the scheduler's where SGLang has loaded its module.

    A spawned scheduler process has loaded it by the time it loads plugins. Elsewhere it may stay
    unloaded.
    """
    return (*_COMMAND_LINE, *_IN_SCHEDULER) if _SCHEDULER_MODULE in sys.modules else _COMMAND_LINE


@functools.cache
def _warn_of_skipped_hooks() -> None:
    """Called by each hook of a process: SGLang applies hooks after :func:`register` has returned.

    A hook that did not take never runs, so the hooks that run report those that do not.
    """
    attempt(_report_skipped_hooks, loses("the report on hooks that do not run"))


def _report_skipped_hooks() -> None:
    why_not = hooks.why_not_applied(_hooks_of_process())
    if why_not is not None:
        logger.warning("sglang-nsa-plugin: %s, so the plugin's hook there does not run", why_not)


def _add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    _warn_of_skipped_hooks()
    return options.add_flags(original, parser)


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    from sglang_nsa_plugin.kernels import cuda

    _warn_of_skipped_hooks()
    server_args = options.keep_flags(original, cls, args)
    backend = options.backend_of(server_args)
    if backend == "cuda":
        _end_if(f"{options.FLAG} cuda", cuda.why_unavailable())
    if backend != "off" and options.check_of(server_args):
        _end_if(options.CHECK_FLAG, cuda.why_unavailable())
    _export_to_sgl_kernel()
    logger.info(
        "sglang-nsa-plugin %s: metadata backend %s, set up in each scheduler process",
        VERSION,
        backend,
    )
    return server_args


def _end_if(asked_for: str, why_not: str | None) -> None:
    """The launcher sees without a GPU that a library is missing, before it starts any rank."""
    if why_not is not None:
        raise SystemExit(f"sglang-nsa-plugin: {asked_for} cannot run: {why_not}")


def _init_scheduler(
    original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """The adapter's hooks must be in place before the Scheduler makes its attention backends.

    With ``--enable-metrics`` a scheduler has a collector afterwards, whose labels name its rank.
    """
    from sglang_nsa_plugin.adapters import switch  # noqa: F401  # in service it may be gone from the disk

    _warn_of_skipped_hooks()
    activate(server_args)
    original(scheduler, server_args, *args, **kwargs)
    collector = getattr(scheduler, "metrics_collector", None)
    if collector is not None:
        from sglang_nsa_plugin import metrics

        attempt(metrics.export, loses("its part of /metrics"), collector.labels)


def _get_internal_state(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """``/server_info`` shows what this rank does."""
    _warn_of_skipped_hooks()
    output = original(scheduler, *args, **kwargs)
    attempt(_add_record, loses("its part of /server_info"), output)
    return output


def _add_record(output: Any) -> None:
    output.internal_state[RECORD_KEY] = record()


def _set_internal_state(
    original: Callable[..., Any], scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> Any:
    """``/set_internal_state`` switches the fill of this rank."""
    from sglang_nsa_plugin.adapters import switch

    _warn_of_skipped_hooks()
    return switch.set_internal_state(
        lambda request: original(scheduler, request, *args, **kwargs), recv_req
    )


_COMMAND_LINE = (
    Hook(f"{_SERVER_ARGS}.add_cli_args", ("parser",), _add_cli_args),
    Hook(f"{_SERVER_ARGS}.from_cli_args", ("args",), _from_cli_args),
)
_IN_SCHEDULER = (
    Hook(f"{_SCHEDULER}.__init__", ("self", "server_args"), _init_scheduler, and_more=True),
    Hook(f"{_SCHEDULER}.get_internal_state", ("self",), _get_internal_state, and_more=True),
    Hook(f"{_SCHEDULER}.set_internal_state", ("self", "recv_req"), _set_internal_state, and_more=True),
)


def activate(server_args: Any) -> None:
    """Installs the adapter for a server with these arguments, or says why SGLang fills itself.

    Raises:
        BackendUnavailableError: a backend was asked for by name and no adapter fits this SGLang.
    """
    from sglang_nsa_plugin.adapters import install
    from sglang_nsa_plugin.adapters.adapter import Request
    from sglang_nsa_plugin.adapters.outcome import OUTCOME

    _export_to_sgl_kernel()
    request = Request(options.backend_of(server_args), options.check_of(server_args))
    why_idle = "switched off" if request.backend == "off" else install.why_idle(server_args)
    if why_idle is not None:
        OUTCOME.report_idle(why_idle)
        return
    why_not = install.install(request)
    if why_not is not None:
        OUTCOME.step_aside(request.backend, why_not)


def _export_to_sgl_kernel() -> None:
    """Puts the two plain functions into ``sgl_kernel``, beside SGLang's kernels, where it is loaded.

    The plugin does not load it: that takes seconds and may start a CUDA context. SGLang loads it at
    different times, so this is called at each moment at which the plugin runs: when a process registers,
    when the main process has parsed its arguments, and when a scheduler is made, which has loaded it.
    """
    sgl_kernel = sys.modules.get("sgl_kernel")
    if sgl_kernel is None:
        return

    from sglang_nsa_plugin import api

    for name in ("fill_draft_extend_metadata_cuda", "fill_draft_extend_metadata_cuda_adaptive"):
        setattr(sgl_kernel, name, getattr(api, name))
