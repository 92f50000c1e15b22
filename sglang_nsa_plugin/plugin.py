"""The entry point: decides whether this process fills metadata, and logs it in one line.

SGLang calls :func:`register` in the main process before it parses arguments, and again in each
scheduler process. Only the scheduler needs SGLang's GPU modules, so the adapter is installed when the
Scheduler is made. Registering imports none of them and starts no CUDA context.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.hooks import Hook
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import logger_of, loses
from sglang_nsa_plugin.state import DRAFT_DECODE, DRAFT_EXTEND, VERSION, record

if TYPE_CHECKING:
    from sglang_nsa_plugin.adapters.adapter import Request

logger = logger_of(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{_SCHEDULER_MODULE}.Scheduler"
RECORD_KEY = "nsa_metadata"
OF_DRAFT_MODEL = (DRAFT_EXTEND, DRAFT_DECODE)  # --speculative-draft-attention-backend is theirs
CONCLUDED = "_nsa_concluded"  # on a scheduler whose verdict was given


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
    _report_skipped(hooks.why_skipped(_hooks_of_process()))
    _export_to_sgl_kernel()


def _hooks_of_process() -> tuple[Hook, ...]:
    """The command line's in every process; the scheduler's where SGLang has loaded its module.

    A spawned scheduler process has loaded it by the time it loads plugins. Elsewhere it may stay
    unloaded.
    """
    return (*_COMMAND_LINE, *_IN_SCHEDULER) if _SCHEDULER_MODULE in sys.modules else _COMMAND_LINE


@functools.cache
def _report_hooks() -> None:
    """Called by each hook of a process: SGLang applies hooks after :func:`register` has returned.

    A hook that did not take never runs, so the hooks that run report those that do not.
    """
    attempt(_report_skipped_hooks, loses("the report on hooks that do not run"))


def _report_skipped_hooks() -> None:
    _report_skipped(hooks.why_not_applied(_hooks_of_process()))


@functools.cache
def _report_skipped(why_not: str | None) -> None:
    if why_not is not None:
        logger.warning(
            "sglang-nsa-plugin: %s, so the plugin's hook there does not run. %s", why_not, _LEAVE_OUT
        )


def _add_cli_args(original: Callable[..., Any], parser: Any, *more: Any, **named: Any) -> Any:
    _report_hooks()
    return options.add_flags(lambda given: original(given, *more, **named), parser)


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any, *more: Any, **named: Any) -> Any:
    from sglang_nsa_plugin.kernels import cuda

    _report_hooks()
    server_args = options.keep_flags(lambda cls, args: original(cls, args, *more, **named), cls, args)
    backend = options.backend_of(server_args)
    if backend == "cuda":
        _end_if(f"{options.FLAG} cuda", cuda.why_unavailable())
    if backend != "off" and options.check_of(server_args):
        _end_if(options.CHECK_FLAG, cuda.why_unavailable())
    _export_to_sgl_kernel()
    _foretell(server_args, backend)
    return server_args


def _end_if(asked_for: str, why_not: str | None) -> None:
    """The launcher sees without a GPU that a library is missing, before it starts any rank."""
    if why_not is not None:
        raise SystemExit(f"sglang-nsa-plugin: {asked_for} cannot run: {why_not}")


def _foretell(server_args: Any, backend: str) -> None:
    """The launcher says where the fill is set up, or that no scheduler process is going to do it."""
    from sglang_nsa_plugin.adapters import install

    why_not = _why_no_scheduler_asks(server_args)
    roles = options.roles_of(server_args)
    is_idle = all(install.why_idle(server_args, role) is not None for role in roles)
    if why_not is None or backend == "off" or is_idle:
        logger.info(
            "sglang-nsa-plugin %s: metadata backend %s, set up in each scheduler process",
            VERSION,
            backend,
        )
        return
    if backend != options.DEFAULT:
        _end_if(f"{options.FLAG} {backend}", why_not)
    logger.warning(
        "sglang-nsa-plugin %s: not used: %s; SGLang fills %s metadata itself",
        VERSION,
        why_not,
        ", ".join(roles),
    )


def _why_no_scheduler_asks(server_args: Any) -> str | None:
    """Schedulers load the plugins that the launcher has loaded, in the same order."""
    if getattr(server_args, "use_ray", False):
        return (
            "with --use-ray schedulers run in Ray actors, where SGLang loads no plugins. Start without "
            "--use-ray to use this one"
        )
    skipped = hooks.why_skipped([_SCHEDULER_INIT])
    return skipped and f"{skipped}. {_LEAVE_OUT}"


def _configure_scheduler_process(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Runs before the scheduler is made, with its arguments, and sets up its log.

    Where the hook around the constructor was skipped, nothing else of the plugin runs before minutes of
    loading a model.
    """
    result = original(server_args, *args, **kwargs)
    _report_hooks()
    skipped = hooks.why_not_applied([_SCHEDULER_INIT])
    if skipped is not None:
        _decline(server_args, f"{skipped}. {_LEAVE_OUT}")
    return result


def _init_scheduler(
    original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """The adapter's hooks must be in place before the Scheduler makes its attention backends."""
    from sglang_nsa_plugin.adapters import switch  # noqa: F401  # in service it may be gone from the disk

    _report_hooks()
    activate(server_args)
    original(scheduler, server_args, *args, **kwargs)
    _conclude(scheduler, server_args)


def _get_init_info(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs when the constructor has returned, also where the hook around it did not run."""
    _report_hooks()
    _conclude(scheduler, scheduler.server_args)
    return original(scheduler, *args, **kwargs)


def _conclude(scheduler: Any, server_args: Any) -> None:
    """Start-up is over: says whether the fill is in place, once for a scheduler.

    With ``--enable-metrics`` a scheduler has a collector now, whose labels name its rank.

    Raises:
        BackendUnavailableError: a backend was asked for by name and does not fill.
    """
    from sglang_nsa_plugin.adapters import verdict
    from sglang_nsa_plugin.adapters.outcome import OUTCOME

    if CONCLUDED in vars(scheduler):
        return
    setattr(scheduler, CONCLUDED, True)
    if OUTCOME.is_undecided:
        _decline(server_args, f"the plugin's hook of {_SCHEDULER_INIT.target} did not run")
    else:
        requests = _requests(server_args, options.roles_of(server_args))
        verdict.conclude(scheduler, server_args, requests)
    collector = getattr(scheduler, "metrics_collector", None)
    if collector is not None:
        from sglang_nsa_plugin import metrics

        attempt(metrics.export, loses("its part of /metrics"), collector.labels)


def _get_internal_state(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """``/server_info`` shows what this rank does."""
    _report_hooks()
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

    _report_hooks()
    return switch.set_internal_state(
        lambda request: original(scheduler, request, *args, **kwargs), recv_req
    )


_LEAVE_OUT = (
    "It called HookRegistry.apply_hooks() itself, which SGLang does when all plugins are loaded; this "
    "plugin runs without that call, or without that plugin (SGLANG_PLUGINS lists those to load)"
)
_COMMAND_LINE = (
    Hook(f"{_SERVER_ARGS}.add_cli_args", ("parser",), _add_cli_args),
    Hook(f"{_SERVER_ARGS}.from_cli_args", ("args",), _from_cli_args),
)
_SCHEDULER_INIT = Hook(f"{_SCHEDULER}.__init__", ("self", "server_args"), _init_scheduler, and_more=True)
_IN_SCHEDULER = (
    Hook(
        f"{_SCHEDULER_MODULE}.configure_scheduler_process",
        ("server_args",),
        _configure_scheduler_process,
        and_more=True,
    ),
    _SCHEDULER_INIT,
    Hook(f"{_SCHEDULER}.get_init_info", ("self",), _get_init_info, and_more=True),
    Hook(f"{_SCHEDULER}.get_internal_state", ("self",), _get_internal_state, and_more=True),
    Hook(f"{_SCHEDULER}.set_internal_state", ("self", "recv_req"), _set_internal_state, and_more=True),
)


def activate(server_args: Any) -> None:
    """Installs the adapter for a server with these arguments, or says why SGLang fills itself.

    Raises:
        BackendUnavailableError: a backend was asked for by name and no adapter fits this SGLang.
    """
    from sglang_nsa_plugin.adapters import install

    _export_to_sgl_kernel()
    requests = _requests(server_args, _roles_with_metadata(server_args))
    why_other = install.why_other_attention(server_args)
    if why_other is not None:
        of_draft_model = {role: requests.pop(role) for role in OF_DRAFT_MODEL if role in requests}
        _step_aside(of_draft_model, why_other, is_expected=False)
    why_not = install.install(requests) if requests else None
    if why_not is not None:
        _step_aside(requests, why_not)


def _requests(server_args: Any, roles: Iterable[str]) -> dict[str, Request]:
    """What the server asks for, of each of these roles."""
    from sglang_nsa_plugin.adapters.adapter import Request

    return {
        role: Request(
            options.backend_of(server_args),
            options.check_of(server_args),
            options.names_role(server_args, role),
            options.wide_tables_of(server_args) == options.KEEP,
        )
        for role in roles
    }


def _decline(server_args: Any, why_not: str) -> None:
    """The plugin cannot be set up in this process; says so where there is something to fill.

    Raises:
        BackendUnavailableError: a backend was asked for by name.
    """
    _step_aside(_requests(server_args, _roles_with_metadata(server_args)), why_not)


def _roles_with_metadata(server_args: Any) -> list[str]:
    """The roles that are asked for and of which this server has metadata; of the others it says why."""
    from sglang_nsa_plugin.adapters import install
    from sglang_nsa_plugin.adapters.outcome import report_not_expected

    roles = options.roles_of(server_args)
    if DRAFT_EXTEND not in roles:
        report_not_expected([DRAFT_EXTEND], f"{options.ROLES_FLAG} leaves it out")
    is_off = options.backend_of(server_args) == "off"
    why_idle = {
        role: "switched off" if is_off else install.why_idle(server_args, role) for role in roles
    }
    for reason in dict.fromkeys(why_idle.values()):
        if reason is not None:
            report_not_expected([role for role in roles if why_idle[role] == reason], reason)
    return [role for role in roles if why_idle[role] is None]


def _step_aside(requests: Mapping[str, Request], why_not: str, *, is_expected: bool = True) -> None:
    from sglang_nsa_plugin.adapters.outcome import OUTCOMES, report_idle, report_not_expected

    for role, request in requests.items():
        OUTCOMES[role].end_if_named(request.asked_for, why_not)
    if is_expected:
        report_idle(requests, why_not)
    else:
        report_not_expected(requests, why_not)


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
