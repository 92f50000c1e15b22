"""Nothing of the plugin raises out of a hook in service, whichever call inside it fails.

Each hook runs again and again, and each time another of the calls that the plugin makes in it fails:
functions of the package, and whatever is written in C, such as torch's. SGLang's own functions are not
touched: their errors are SGLang's.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, replay_and_expect_equal
from failing_calls import (
    AT_START,
    IN_SERVICE,
    Original,
    PlantedError,
    errors_of,
    every_call,
    failing_call,
    fresh,
    sglangs,
)
from test_runner import make_runner
from test_start_faults import serve_and_expect_sglangs_values
from test_switch import real_scheduler

from sglang_nsa_plugin import log, plugin
from sglang_nsa_plugin.adapters import (
    draft_decode,
    eager,
    in_graph,
    supported,
    taken_over,
    tree_mask,
)
from sglang_nsa_plugin.adapters.outcome import OUTCOME, OUTCOMES
from sglang_nsa_plugin.state import ALL_ROLES

pytestmark = on_the_cpu


def test_every_hook_is_one_of_the_two() -> None:
    """A new hook needs a test here, or a reason why an error may leave it."""
    from sglang_nsa_plugin.adapters.eager_names import DSA, NSA

    tables = (*plugin._COMMAND_LINE, *plugin._IN_SCHEDULER, *in_graph.ADAPTER.common.hooks)
    tables += (tree_mask.HOOK,)
    tables += tuple(hook for parts in in_graph.ADAPTER.parts.values() for hook in parts.hooks)
    hooks = (*tables, *eager._hooks(DSA), *eager._hooks(NSA))
    assert {hook.replacement for hook in hooks} | {eager._replay} == AT_START | IN_SERVICE


# --- the fill ---

OUT_GRAPH = {
    "draft-extend": in_graph._out_graph,
    "draft-decode": draft_decode._out_graph,
    "verify": in_graph._out_graph,
    "decode": in_graph._out_graph,
}
NO_HOOK_BEHIND = ("draft-decode", "verify", "decode")


def replaced_lengths(view):
    view.seq_lens = view.seq_lens.clone()
    view.seq_lens[:1] += 1


def unchanged(view): ...


@pytest.mark.parametrize("prepare", [unchanged, replaced_lengths], ids=["served", "fallback"])
@pytest.mark.parametrize("check_every", [0, 1])
@pytest.mark.parametrize("role", ALL_ROLES)
def test_sglang_fills_a_step_whose_fill_failed_and_all_after_it(
    role, prepare, check_every, state, caplog
):
    outcome = OUTCOMES[role]

    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        pair = make_pair(check_every=check_every, role=role)
        backend, fills = pair.ours.backend, pair.fills()
        captured = dict(fills.captured)
        bs = random_batch(pair, torch.Generator().manual_seed(number), raw_bs=3)
        view = pair.ours.replay_view(bs)
        prepare(view)
        original = sglangs(type(backend).init_forward_metadata_out_graph)
        with pair.stub_process(), failing_call(number) as failed:
            OUT_GRAPH[role](original, backend, view)
        if not failed:
            return failed
        if outcome.has_failed:
            assert original.calls == 1, failed
            assert len(errors_of(caplog)) == 1, failed
            assert "please report this line" in errors_of(caplog)[0]
            assert f"PlantedError: {failed[0]}" in outcome.state.reason
            assert not fills.enabled.any(), failed
            assert taken_over.FAST_PATH not in vars(backend)
            for _ in range(3):
                again = random_batch(pair, torch.Generator().manual_seed(number))
                serve_and_expect_sglangs_values(pair, captured, again)
        else:  # a line of the log or the check was lost, and nothing else
            assert original.calls == (prepare is replaced_lengths), failed
        return failed

    names = every_call(run)
    assert {"BackendFills.validate", "GraphFill.reads", "_addresses"} <= set(names)
    if prepare is replaced_lengths:
        assert {"count_fallback", "BackendFills._switch", "fill_", "Logger.warning"} <= set(names)


@pytest.mark.parametrize("role", ALL_ROLES)
def test_an_error_of_sglangs_own_fill_passes_as_it_is(role, state):
    pair = make_pair(role=role)
    bs = random_batch(pair, torch.Generator().manual_seed(1), raw_bs=2)
    view = pair.ours.replay_view(bs)
    replaced_lengths(view)

    def failing(*_, **__):
        raise KeyError("SGLang's own")

    original = Original(failing)
    with pair.stub_process(), pytest.raises(KeyError, match="SGLang's own"):
        OUT_GRAPH[role](original, pair.ours.backend, view)
    assert original.calls == 1
    assert not OUTCOMES[role].has_failed


@pytest.mark.parametrize("role", ALL_ROLES)
def test_a_fill_that_cannot_be_switched_off_on_the_device_ends_the_process(role, state, monkeypatch):
    """Raising is the lesser evil: the captured fill would write over SGLang's values."""
    pair = make_pair(role=role)
    fills = pair.fills()

    class Lost:
        def fill_(self, _):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fills, "enabled", Lost())
    monkeypatch.setattr(fills, "validate", None)
    bs = random_batch(pair, torch.Generator().manual_seed(1))
    with pair.stub_process(), pytest.raises(RuntimeError, match="illegal memory access"):
        pair.ours.backend.init_forward_metadata_out_graph(pair.ours.replay_view(bs))


@pytest.mark.parametrize("check_every", [0, 1])
def test_after_an_error_behind_a_replay_the_scheduler_waits_for_the_whole_forward(
    check_every, state, caplog
):
    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        pair = make_pair(check_every=check_every)
        runner = make_runner(pair)
        fence = supported.fence_event(runner.model_runner)
        bs = runner.bs = random_batch(pair, torch.Generator().manual_seed(2), raw_bs=2)
        with pair.stub_process():
            pair.ours.backend.init_forward_metadata_out_graph(pair.ours.replay_view(bs))
        fills = pair.fills()
        fills.captured[bs].read_done = "ours"
        setattr(runner.model_runner, fence, "SGLang's, recorded before the replay")
        original = Original(lambda runner, *_: "output")
        with pair.stub_process(), failing_call(number) as failed:
            assert in_graph._execute(original, runner, None) == "output"
        assert original.calls == 1
        if failed:
            assert len(errors_of(caplog)) == 1, failed
            published = getattr(runner.model_runner, fence)
            assert published == (None if OUTCOME.has_failed else "ours"), failed
            assert fills.enabled.any() != OUTCOME.has_failed, failed
        return failed

    names = every_call(run)
    assert {"BackendFills.read_done", "_set_fence", "setattr"} <= set(names)
    if check_every:
        assert {"ShadowedReplays.run", "Comparison.run"} <= set(names)


# --- the shadow check ---


@pytest.mark.parametrize(
    ("role", "call"),
    [
        ("draft-extend", "shadow_check.ShadowedReplays.plan"),
        ("draft-extend", "shadow_check.ShadowedReplays.run"),
        *((role, "shadow_check.ShadowedReplays.fill_ahead") for role in NO_HOOK_BEHIND),
        *((role, "shadow_check.ShadowedReplays.compare_last") for role in NO_HOOK_BEHIND),
        *((role, "shadow_check.Report.arrived") for role in ALL_ROLES),
        *((role, "shadow_check.Comparison.run") for role in ALL_ROLES),
    ],
)
def test_a_check_that_fails_is_lost_and_the_fill_goes_on(role, call, state, monkeypatch, caplog):
    pair = make_pair(check_every=1, role=role)

    def failing(*_):
        raise PlantedError(call)

    monkeypatch.setattr(f"sglang_nsa_plugin.adapters.{call}", failing)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        bs = random_batch(pair, generator)
        replay_and_expect_equal(pair, bs)
    assert (OUTCOMES[role].state.replays, OUTCOMES[role].has_failed) == (4, False)
    (said,) = errors_of(caplog)
    assert said.startswith(f"sglang-nsa-plugin: the shadow check is lost: PlantedError: {call} (")
    assert "Nothing else is" in said


# --- /server_info and the switch ---


def test_server_info_loses_its_own_part_alone(state, caplog):
    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        original = Original(lambda _: SimpleNamespace(internal_state={"SGLang's": 1}))
        with failing_call(number) as failed:
            output = plugin._get_internal_state(original, None)
        assert original.calls == 1
        assert output.internal_state["SGLang's"] == 1
        if failed:
            assert len(errors_of(caplog)) == 1, failed
        return failed

    assert "record" in every_call(run)


def test_server_info_says_so_once(state, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "record", lambda: 1 / 0)
    for _ in range(3):
        plugin._get_internal_state(lambda _: SimpleNamespace(internal_state={}), None)
    (said,) = errors_of(caplog)
    assert said.startswith(
        "sglang-nsa-plugin: its part of /server_info is lost: ZeroDivisionError: division by zero ("
    )


def test_a_switch_that_fails_leaves_the_answer_to_sglang(state, caplog):
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.managers.scheduler import Scheduler

    def run(number: int) -> list[str]:
        caplog.clear()
        fresh()
        make_pair()
        original = sglangs(Scheduler.set_internal_state)
        request = SetInternalStateReq(server_args={"nsa_metadata": 0})
        with real_scheduler() as scheduler, failing_call(number) as failed:
            plugin._set_internal_state(original, scheduler, request)
        assert original.calls == 1, failed
        return failed

    assert {"_without_keys", "switch"} <= set(every_call(run))


# --- the log ---


def test_a_log_that_raises_loses_a_line_alone(state, monkeypatch):
    """A filter of a configuration file, say: handlers' errors are caught by `logging` itself."""

    def failing(_):
        raise PlantedError("filter")

    logger = logging.getLogger("sglang.nsa_plugin.adapters.fallbacks")
    monkeypatch.setattr(logger, "filters", [failing])
    pair = make_pair()
    view = pair.ours.replay_view(random_batch(pair, torch.Generator().manual_seed(1)))
    replaced_lengths(view)
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    assert sum(state.fallbacks.values()) == 1
    assert not OUTCOME.has_failed


def test_a_line_is_said_to_come_from_its_caller(caplog):
    log.logger_of("sglang_nsa_plugin.plugin").warning("sglang-nsa-plugin: a %s", "line")
    (line,) = caplog.records
    assert (line.name, line.filename) == ("sglang.nsa_plugin.plugin", "test_service_faults.py")
