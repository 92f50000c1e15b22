"""The empty kernel before replays of the target's graph: when it is launched, and when it fails.

A stand-in counts its launches on the CPU; tests/gpu/test_gpu_in_graph.py has the kernel itself.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, replay_and_expect_equal
from test_switch import ask

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND, QUERY_EVERY, SURE_AFTER
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


class FillDone:
    """The event behind the last fill of draft-extend; counts how often it is queried."""

    def __init__(self) -> None:
        self.queried, self.is_done = 0, True

    def query(self) -> bool:
        self.queried += 1
        return self.is_done


@pytest.fixture
def fill_done(monkeypatch):
    event = FillDone()
    monkeypatch.setattr(LAST_DRAFT_EXTEND, "fill_done", event)
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
    assert "before replays of verify's graph" in line
    assert "planted: the kernel launch failed" in line


@pytest.fixture
def keeps_up(launches, fill_done):
    """A pair that knows every batch size, and a GPU that has kept up with the host all along."""
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(5)
    replay(pair, generator, times=SURE_AFTER + 2 * QUERY_EVERY)
    assert (launches.count, fill_done.queried) == (0, SURE_AFTER + 2)
    fill_done.queried = 0
    return lambda times: replay(pair, generator, times)


def test_while_the_gpu_keeps_up_nothing_is_launched_and_few_replays_query(keeps_up, launches, fill_done):
    keeps_up(4 * QUERY_EVERY)
    assert (launches.count, fill_done.queried) == (0, 4)


def test_a_gpu_that_has_become_busy_is_noticed_and_again_that_it_keeps_up(keeps_up, launches, fill_done):
    fill_done.is_done = False
    keeps_up(QUERY_EVERY)
    assert launches.count == 1  # with the last of them
    keeps_up(5)
    assert (launches.count, fill_done.queried) == (6, 6)
    fill_done.is_done, fill_done.queried = True, 0
    keeps_up(SURE_AFTER + QUERY_EVERY)
    assert (launches.count, fill_done.queried) == (6, SURE_AFTER + 1)


def test_a_prefill_in_between_costs_one_launch(launches, fill_done):
    """After it the last event is of a step before the prefill, and long done."""
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(7)
    for step in range(24):
        fill_done.is_done = step % 4 == 0
        replay(pair, generator)
    assert (launches.count, fill_done.queried) == (18, 24)


def test_an_error_of_the_query_ends_it_too(launches, fill_done, monkeypatch, caplog):
    pair, generator = make_pair(role="verify"), torch.Generator().manual_seed(6)
    failing = mock.Mock(side_effect=RuntimeError("planted: the query failed"))
    monkeypatch.setattr(fill_done, "query", failing)
    replay(pair, generator, times=3)
    assert (launches.count, failing.call_count, STATES["verify"].replays) == (0, 1, 3)
    assert pair.fills().no_op is None
    (line,) = [each.message for each in caplog.records if "empty kernel" in each.message]
    assert "planted: the query failed" in line
