"""The switch in service, through SGLang's real ``set_internal_state`` and backend classes."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cpu_pair import expect_equal, make_pair, on_the_cpu, plan_and_expect_nothing_written, random_batch

pytest.importorskip("sglang")

from sglang_nsa_plugin import plugin
from sglang_nsa_plugin.adapters import in_graph
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOME
from sglang_nsa_plugin.shadow import Difference
from sglang_nsa_plugin.state import record

pytestmark = on_the_cpu
OFF = FallbackReason.SWITCHED_OFF.value


def make(**harness: object):
    """Two backends of the installed SGLang, one of them taken over."""
    if in_graph.is_generation():
        return make_pair(**harness)
    from sglang_nsa_plugin.harness.eager_pair import EagerPair

    settings = {"draft_tokens": 4, "context_len": 512, "pool_size": 12, **harness}
    return EagerPair(torch.device("cpu"), (1, 2, 4, 8), "auto", **settings)


@pytest.fixture
def pair(state):
    return make()


@contextlib.contextmanager
def real_scheduler():
    """What SGLang's method asks of its scheduler; up to 0.5.17 it also answers with all arguments."""
    from sglang.srt.managers import scheduler as module

    scheduler = SimpleNamespace(
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        metrics_reporter=SimpleNamespace(),
        max_running_requests=64,
        ps=SimpleNamespace(pp_size=1),
        pp_size=1,
    )
    with contextlib.ExitStack() as stack:
        if hasattr(module, "get_global_server_args"):
            arguments = SimpleNamespace()
            stack.enter_context(
                mock.patch.object(module, "get_global_server_args", return_value=arguments)
            )
        with contextlib.suppress(ImportError):  # up to 0.5.21 the scheduler does it itself
            from sglang.srt.managers.scheduler_components import internal_state

            scheduler.internal_state = internal_state.SchedulerInternalStateController(scheduler, False)
        yield scheduler


def ask(**server_args: float) -> bool:
    """Whether SGLang's answer to a request with these settings is that it was updated."""
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.managers.scheduler import Scheduler

    with real_scheduler() as scheduler:
        request = SetInternalStateReq(server_args=server_args)
        answer = plugin._set_internal_state(Scheduler.set_internal_state, scheduler, request)
    assert request.server_args == server_args  # other ranks get the same object
    return answer.updated


def step_and_expect_equal(pair, generator):
    """Our tensors are poisoned before, but where SGLang fills: it does not write all of them."""
    from sglang_nsa_plugin.harness.diff import Diff

    bs = random_batch(pair, generator)
    if OUTCOME.is_switched_on or not in_graph.is_generation():
        result = Diff()
        pair.step(bs, result)
        assert result.first is None, result.first
    else:
        pair.theirs.sglang_fill(bs)
        pair.replay(bs)
        expect_equal(pair, bs)


def served(state) -> int:
    return state.replays + state.launches


def test_off_hands_every_step_to_sglang_and_on_takes_it_back(pair, state, caplog):
    """Every step is compared with SGLang's own fill, also those right after a switch."""
    caplog.set_level(logging.INFO)
    generator = torch.Generator().manual_seed(1)
    for round_ in (1, 2):
        for _ in range(3):
            step_and_expect_equal(pair, generator)
        assert ask(nsa_metadata=0)
        assert not record()["switched_on"]
        for _ in range(2):
            step_and_expect_equal(pair, generator)
        assert served(state) == 3 * round_
        assert state.fallbacks == {OFF: 2 * round_}
        assert ask(nsa_metadata=1)
        assert record()["switched_on"]
    said = [r.getMessage() for r in caplog.records if "in service" in r.getMessage()]
    assert [line.partition("switched ")[2][:3] for line in said] == ["off", "on ", "off", "on "]


def test_a_captured_fill_that_is_switched_off_writes_nothing(pair):
    """SGLang's values are there before the graph runs, whatever the captured inputs hold by then."""
    if not in_graph.is_generation():
        pytest.skip("an eager fill is not in a graph")
    generator = torch.Generator().manual_seed(2)
    step_and_expect_equal(pair, generator)
    ask(nsa_metadata=0)
    bs = random_batch(pair, generator)
    plan_and_expect_nothing_written(pair, bs)


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_another_value_is_refused_in_words(pair, value, caplog):
    ask(nsa_metadata=value)
    assert record()["switched_on"]
    said = [r.getMessage() for r in caplog.records if "is refused" in r.getMessage()]
    assert said == [
        f"sglang-nsa-plugin: nsa_metadata={value} is refused: must be 0 (SGLang fills) or 1 (the "
        "plugin fills)"
    ]


@pytest.mark.parametrize("value", [0, 1])
def test_where_nothing_is_filled_the_answer_is_sglangs_to_an_unknown_key(state, value, caplog):
    OUTCOME.report_idle("the reason")
    assert ask(nsa_metadata=value) == ask(unknown=value)
    assert record()["switched_on"]
    assert "the plugin fills nothing here: the reason" in caplog.text


def test_sglangs_own_keys_are_set_with_ours_or_neither(pair):
    if not refuses_unknown_keys():
        pytest.skip("this SGLang answers that a key was updated which it refused")
    assert not ask(nsa_metadata=0, unknown=1)
    assert record()["switched_on"]
    assert not ask(nsa_metadata=7, speculative_accept_threshold_acc=1.0)


def refuses_unknown_keys() -> bool:
    return not ask(unknown=1)


def test_a_difference_is_not_switched_away(pair, state, caplog):
    caplog.set_level(logging.INFO)
    OUTCOME.fail(Difference(1, "page_table_1", 0, 0, 1, 2, 1, None))
    ask(nsa_metadata=0)
    ask(nsa_metadata=1)
    assert record()["switched_on"], "off and on would leave it off: a failed fill cannot be switched on"
    assert OUTCOME.has_failed
    assert "so SGLang already fills draft-extend metadata; its switch stays as it is" in caplog.text
    assert "until this process ends" in caplog.text


def test_the_shadow_check_goes_on_after_the_switch(state):
    pair = make(check_every=1)
    generator = torch.Generator().manual_seed(3)
    for value, checks in ((1, 2), (0, 2), (1, 4)):
        ask(nsa_metadata=value)
        for _ in range(2):
            step_and_expect_equal(pair, generator)
        assert state.checks == checks
