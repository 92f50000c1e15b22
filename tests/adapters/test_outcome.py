"""The outcome's three states: what is reported in each, and the log lines, word by word."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from cases import CPU

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters.outcome import WAITING, Outcome, Phase
from sglang_nsa_plugin.dispatch import BackendUnavailableError, Choice

PLUGIN = f"sglang-nsa-plugin {version('sglang-nsa-plugin')}"
CHOICE = Choice("cuda", dispatch.choose("torch", CPU).bind, "first choice", {})


class Difference:
    """What a shadow check found, in words."""

    count = 3

    def __str__(self) -> str:
        return "ours 1, theirs 2"


@pytest.fixture
def outcome(state, caplog) -> Outcome:
    caplog.set_level("INFO", "sglang.nsa_plugin")
    return Outcome()


def reported(state) -> tuple:
    return state.adapter, state.backend, state.reason


def test_the_first_state_is_idle_for_the_reason_that_the_state_has(outcome, state, caplog):
    assert (outcome.phase, outcome.adapter, outcome.backend) == (Phase.IDLE, None, None)
    outcome.report_idle(state.reason)
    assert caplog.messages == []


def test_waiting_is_reported_and_not_logged(outcome, state, caplog):
    outcome.report_waiting("in-graph")
    assert reported(state) == ("in-graph", None, WAITING)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("makes_schedule", "by", "end"),
    [
        (None, None, ""),
        (True, "cuda", "; MQA schedule by cuda"),
        (False, "DeepGEMM", "; MQA schedule by DeepGEMM"),
    ],
)
def test_the_first_backend_that_is_filled_is_logged(outcome, state, caplog, makes_schedule, by, end):
    outcome.report_waiting("in-graph")
    outcome.report_active("in-graph", CHOICE, makes_schedule)
    outcome.report_active("in-graph", CHOICE, makes_schedule)
    outcome.report_waiting("another")
    assert reported(state) == ("in-graph", "cuda", "first choice")
    assert (outcome.phase, state.mqa_schedule) == (Phase.ACTIVE, by)
    assert caplog.messages == [
        f"{PLUGIN}: draft-extend: adapter in-graph, implementation cuda: first choice{end}"
    ]


def test_a_warning_is_logged_with_the_first_backend_alone(outcome, caplog):
    for warning in ("untried", "untried, too"):
        outcome.report_active("in-graph", CHOICE, warning=warning)
    assert caplog.messages[1:] == [f"{PLUGIN}: untried"]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_idle_is_logged_once_for_each_reason(outcome, state, caplog):
    outcome.report_active("in-graph", CHOICE)
    state.captures.add(4)
    for reason in ("no kernel", "no kernel", "no table"):
        outcome.report_idle(reason)
        assert reported(state) == (None, None, reason)
    assert not state.captures
    assert caplog.messages[1:] == [
        f"{PLUGIN}: not used: {reason}; SGLang fills draft-extend metadata itself"
        for reason in ("no kernel", "no table")
    ]


def test_a_backend_that_was_left_to_the_plugin_may_step_aside(outcome, state):
    outcome.step_aside_after("auto", RuntimeError("no\nmemory " + 400 * "x"))
    assert state.reason == "the fill could not be set up: RuntimeError: no memory [...]"


def test_a_backend_that_was_asked_for_by_name_may_not(outcome, state):
    with pytest.raises(BackendUnavailableError) as caught:
        outcome.step_aside("cuda", "no memory")
    assert str(caught.value) == (
        "--nsa-metadata-backend cuda was asked for by name and cannot be used: no memory. "
        "Use 'auto' or 'off' to serve with SGLang's own fill"
    )
    complete = BackendUnavailableError("complete")
    with pytest.raises(BackendUnavailableError) as caught:
        outcome.step_aside_after("auto", complete)
    assert caught.value is complete


def test_an_error_in_service_is_final_and_says_where_it_was_raised(outcome, state, caplog):
    outcome.report_active("in-graph", CHOICE)
    try:
        raise RuntimeError("no\nmemory")
    except RuntimeError as error:
        outcome.fail_in_service(error)
        line = error.__traceback__.tb_lineno
    what = f"RuntimeError: no memory (test_outcome.py:{line})"
    assert outcome.has_failed
    assert reported(state) == ("in-graph", "cuda", f"filling a step failed: {what}")
    assert outcome.why_not_switchable(on=True) == (
        "filling a step failed, so SGLang fills until this process ends"
    )
    assert caplog.messages[1:] == [
        f"{PLUGIN}: filling a step failed: {what}. SGLang {version('sglang')}, adapter in-graph, "
        "implementation cuda. From now on this process serves draft-extend through SGLang's own fill; "
        "please report this line"
    ]


def test_a_failure_is_final(outcome, state, caplog):
    outcome.report_active("in-graph", CHOICE)
    state.mismatches = 4
    assert not outcome.has_failed
    outcome.fail(Difference())
    assert outcome.has_failed
    assert (state.mismatches, state.first_mismatch) == (7, "ours 1, theirs 2")
    assert caplog.messages[1:] == [
        f"{PLUGIN}: the shadow check found a difference: ours 1, theirs 2. SGLang {version('sglang')}, "
        "adapter in-graph, implementation cuda. From now on this process serves draft-extend through "
        "SGLang's own fill; please report this line"
    ]
    outcome.report_active("in-graph", CHOICE)
    outcome.report_waiting("in-graph")
    outcome.report_idle("no kernel")
    assert outcome.has_failed
    why = "the shadow check found a difference: ours 1, theirs 2"
    assert reported(state) == ("in-graph", "cuda", why)
