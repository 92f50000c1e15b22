"""A server that releases the memory of its CUDA graphs while a comparison is still to come."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, skip_unless_captured
from isolated import run

from sglang_nsa_plugin.adapters import hooks, memory_release
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.outcome import OUTCOMES

pytestmark = on_the_cpu

CHECKED = Request("auto", 3)


def skip_without_the_component():
    if not memory_release._has_module():
        pytest.skip("this SGLang releases memory in another place, none of it the metadata's")


@pytest.mark.parametrize("role", ["verify", "draft-decode"])
@pytest.mark.parametrize("is_released", [True, False])
def test_the_last_replay_before_a_release_is_not_compared(role, is_released, state):
    skip_unless_captured(role)
    pair = make_pair(role=role, check_every=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        pair.replay(random_batch(pair, generator))
    asked = []
    if is_released:
        memory_release._release(lambda updater, request: asked.append(request), None, "all tags")
        assert asked == ["all tags"]
    first = getattr(pair.ours.backend, "attn_backends", [pair.ours.backend])[0]
    for metadata in first.decode_cuda_graph_metadata.values():  # memory that comes back as zeros
        if dataclasses.is_dataclass(metadata):
            metadata.cache_seqlens_int32.zero_()
    for _ in range(3):
        pair.replay(random_batch(pair, generator))
    outcome = OUTCOMES[role]
    assert outcome.has_failed is not is_released
    if is_released:
        assert (outcome.state.checks, outcome.state.mismatches) == (5, 0)


PROGRAM = """
import sys
from types import SimpleNamespace
import sglang.srt.managers.scheduler as module
from sglang.srt.managers.scheduler_components import weight_updater

updater = weight_updater.SchedulerWeightUpdaterManager
before = updater.release_memory_occupation
def make(self, server_args):
    print("hooked:", updater.release_memory_occupation is not before)

module.Scheduler.__init__ = make
from sglang.srt.plugins import load_plugins
load_plugins()
module.Scheduler(SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="dsa"))
"""


@pytest.mark.parametrize("every", [0, 3])
def test_where_fills_are_checked_the_release_is_hooked_before_a_scheduler_binds_it(every):
    skip_without_the_component()
    done = run(PROGRAM, SGLANG_NSA_METADATA_CHECK=str(every))
    assert done.returncode == 0, done.stderr
    assert f"hooked: {every > 0}" in done.stdout


def test_a_release_that_cannot_be_hooked_is_told(monkeypatch, caplog):
    skip_without_the_component()
    monkeypatch.setattr(hooks, "misfits", lambda _: ["the method is missing"])
    with caplog.at_level(logging.WARNING):
        memory_release.install([CHECKED])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "sglang-nsa-plugin: this SGLang does not fit: the method is missing. If this server releases"
    )
