"""Lets one call after the other fail that the plugin makes in a hook.

Functions of the package fail, and whatever the adapters call that is written in C, such as torch's.
SGLang's own functions are not touched: their errors are SGLang's.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator

from sglang_nsa_plugin import containment, log, plugin
from sglang_nsa_plugin.adapters import draft_decode, eager, in_graph, switch, taken_over
from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.tree_mask import TREE_MASK

# They run while a server starts, where an error by name is to end the start; see test_start_faults.py.
AT_START = {
    plugin._add_cli_args,
    plugin._from_cli_args,
    plugin._configure_scheduler_process,
    plugin._init_scheduler,
    plugin._get_init_info,
    in_graph._create_backend,
    in_graph._init_backend,
    in_graph._init_cuda_graph_state,
    taken_over.record,
    draft_decode._init,
    draft_decode._init_cuda_graph_state,
    eager._init,
}
IN_SERVICE = {
    plugin._get_internal_state,
    plugin._set_internal_state,
    in_graph._out_graph,
    in_graph._execute,
    draft_decode._out_graph,
    eager._init_forward_metadata,  # test_eager.py
    eager._replay,  # test_eager.py
    TREE_MASK.build,  # test_tree_mask.py
}
# What decides to catch, and what runs before it: objects' attributes, no calls that could fail.
GUARDS = {
    containment.attempt,
    in_graph._slow_path,
    in_graph._itself,
    draft_decode._slow_path,
    draft_decode._plan_by_sglang,
    draft_decode._metadata_of,
    plugin._report_hooks.__wrapped__,
    log.loses,
    switch.set_internal_state,
    *AT_START,
    *IN_SERVICE,
}
NO_FAILURES = ("_set_internal_state.<locals>.<lambda>", "fence_event.<locals>.<genexpr>")
GUARD_CODE = {function.__code__ for function in GUARDS}


class PlantedError(Exception):
    """No error that the plugin expects anywhere."""


@contextlib.contextmanager
def failing_call(number: int) -> Iterator[list[str]]:
    """The call of this number that the plugin makes raises; yields its name, once it has."""
    failed: list[str] = []
    seen = 0

    def profile(frame, event, called):
        nonlocal seen
        if event == "call":
            code, name = frame.f_code, frame.f_code.co_qualname
            is_ours = frame.f_globals["__name__"].startswith("sglang_nsa_plugin.")
        elif event == "c_call":
            code, name = frame.f_code, called.__name__
            is_ours = frame.f_globals["__name__"].startswith("sglang_nsa_plugin.adapters")
        else:
            return
        if not is_ours or code in GUARD_CODE or name in NO_FAILURES:
            return
        if seen == number:
            sys.setprofile(None)
            failed.append(name)
            raise PlantedError(name)
        seen += 1

    sys.setprofile(profile)
    try:
        yield failed
    finally:
        sys.setprofile(None)


def every_call(run: Callable[[int], list[str]]) -> list[str]:
    """Runs with the first call failing, then the second, until none is left."""
    names: list[str] = []
    while failed := run(len(names)):
        names += failed
    return names


class Original:
    """SGLang's function under a hook, counted."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        profile = sys.getprofile()
        sys.setprofile(None)  # what SGLang calls is not planted in
        self.calls += 1
        try:
            return self.function(*args, **kwargs)
        finally:
            sys.setprofile(profile)


def sglangs(function: Callable[..., object]) -> Original:
    return Original(inspect.unwrap(function))


def fresh() -> None:
    """A process in which nothing has failed yet."""
    for each in OUTCOMES.values():
        each.state.__init__(each.state.role)  # type: ignore[misc]
        each.__init__(each.state)  # type: ignore[misc]
    LAST_DRAFT_EXTEND.fill_done = None
    log._lost.clear()
    plugin._report_hooks.cache_clear()
    plugin._report_skipped.cache_clear()


def errors_of(caplog) -> list[str]:
    """The messages of the ERROR lines."""
    return [line.getMessage() for line in caplog.records if line.levelname == "ERROR"]
