"""The empty kernel before each replay of the target's graph: when it is launched, and when it fails.

A stand-in counts its launches on the CPU; tests/gpu/test_gpu_in_graph.py has the kernel itself.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, replay_and_expect_equal
from test_switch import ask

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters.no_op import LastStep, while_behind
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
    assert "before each replay of verify's graph failed and is left out" in line
    assert "planted: the kernel launch failed" in line


@pytest.mark.parametrize(("is_done", "count"), [(None, 1), (False, 1), (True, 0)])
def test_it_is_launched_only_while_the_gpu_is_behind_the_host(is_done, count):
    """None: the plugin does not fill the graph that ends a step."""
    launched, last = Launches(), LastStep()
    launch = while_behind(launched, last)
    last.done = None if is_done is None else SimpleNamespace(query=lambda: is_done)
    launch()
    assert launched.count == count
