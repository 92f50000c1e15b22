"""The empty kernel before replays of the target's graph: when it is launched, and when it fails.

A stand-in counts its launches on the CPU; tests/gpu/test_gpu_in_graph.py has the kernel itself.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, replay_and_expect_equal
from test_switch import ask

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters.no_op import ASK_EVERY, LAST_STEP
from sglang_nsa_plugin.adapters.roles import (
    DECODE_ROLE,
    DRAFT_DECODE_ROLE,
    DRAFT_EXTEND_ROLE,
    VERIFY_ROLE,
)
from sglang_nsa_plugin.state import STATES

pytestmark = on_the_cpu


class Launches:
    """Counts them, and can fail."""

    def __init__(self) -> None:
        self.count, self.fails = 0, False

    def __call__(self) -> None:
        self.count += 1
        if self.fails:
            raise RuntimeError("planted: the kernel launch failed")


class LastStepsEvent:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked, self.is_done = 0, True

    def query(self) -> bool:
        self.asked += 1
        return self.is_done


@pytest.fixture
def done(monkeypatch):
    event = LastStepsEvent()
    monkeypatch.setattr(LAST_STEP, "done", event)
    return event


@pytest.fixture
def launches(state, monkeypatch):
    launched, choose = Launches(), dispatch.choose
    monkeypatch.setattr(
        dispatch,
        "choose",
        lambda *args, **options: dataclasses.replace(
            choose(*args, **options), bind_no_op=lambda device: launched
        ),
    )
    return launched


def replay(pair, generator, times=1):
    for _ in range(times):
        replay_and_expect_equal(pair, random_batch(pair, generator))


@pytest.mark.parametrize("check_every", [0, 1])
@pytest.mark.parametrize("role", [VERIFY_ROLE, DECODE_ROLE], ids=lambda role: role.name)
def test_it_comes_once_before_each_replay_of_the_targets_graph(role, check_every, launches):
    pair = make_pair(role=role.name, check_every=check_every)
    assert launches.count == 0  # none while graphs are captured
    replay(pair, torch.Generator().manual_seed(1), times=20)  # of batch sizes that are new and known
    assert launches.count == STATES[role.name].replays == 20


@pytest.mark.parametrize("role", [DRAFT_EXTEND_ROLE, DRAFT_DECODE_ROLE], ids=lambda role: role.name)
def test_graphs_of_the_draft_model_have_none(role, launches):
    pair = make_pair(role=role.name)
    replay(pair, torch.Generator().manual_seed(2), times=5)
    assert STATES[role.name].replays == 5
    assert launches.count == 0


def test_sglangs_own_plan_has_none(launches):
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(3)
    ask(nsa_metadata=0)
    replay(pair, generator, times=3)
    assert launches.count == 0
    ask(nsa_metadata=1)
    replay(pair, generator, times=3)
    assert launches.count == 3


@pytest.mark.parametrize("check_every", [0, 1])
def test_one_that_fails_is_left_out_and_the_fills_go_on(check_every, launches, caplog):
    pair, generator = make_pair(role="verify", check_every=check_every), torch.Generator().manual_seed(4)
    replay(pair, generator, times=5)
    launches.fails = True
    replay(pair, generator, times=5)
    assert launches.count == 6
    assert STATES["verify"].replays == 10
    assert not STATES["verify"].fallbacks
    (line,) = [each.message for each in caplog.records if "empty kernel" in each.message]
    assert "before replays of verify's graph failed and is left out" in line
    assert "planted: the kernel launch failed" in line


def test_it_is_left_out_while_the_gpu_keeps_up_with_the_host(launches, done):
    """Then few replays ask. A GPU that has fallen behind is noticed, and again that it keeps up."""
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(5)
    replay(pair, generator, times=40)  # every batch size is known from here on
    done.asked = 0
    replay(pair, generator, times=4 * ASK_EVERY)
    assert (launches.count, done.asked) == (0, 4)
    done.is_done = False
    replay(pair, generator, times=ASK_EVERY)
    before = launches.count
    assert before >= 1
    replay(pair, generator, times=5)
    assert launches.count == before + 5
    done.is_done = True
    replay(pair, generator, times=5)
    assert launches.count == before + 5


def test_an_error_of_the_event_ends_it_too(launches, done, monkeypatch, caplog):
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(6)

    def fail():
        raise RuntimeError("planted: the query failed")

    monkeypatch.setattr(done, "query", fail)
    replay(pair, generator, times=3)
    assert (launches.count, STATES["verify"].replays) == (0, 3)
    assert "planted: the query failed" in caplog.text
