"""A server that releases the memory of its CUDA graphs while a comparison is still to come."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, random_batch, skip_unless_captured

from sglang_nsa_plugin.adapters import hooks, memory_release
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.outcome import OUTCOMES

pytestmark = on_the_cpu

CHECKED, UNCHECKED = Request("auto", 3, False), Request("auto", 0, False)


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


def test_the_release_is_hooked_where_fills_are_checked(monkeypatch):
    skip_without_the_component()
    assert hooks.misfits([memory_release.HOOK]) == []
    registered = []
    monkeypatch.setattr(hooks, "register", registered.extend)
    monkeypatch.setattr(hooks, "why_not_applied", lambda _: None)
    memory_release.install([UNCHECKED])
    assert registered == []
    memory_release.install([UNCHECKED, CHECKED])
    assert registered == [memory_release.HOOK]


def test_a_release_that_cannot_be_hooked_is_told(monkeypatch, caplog):
    skip_without_the_component()
    monkeypatch.setattr(hooks, "misfits", lambda _: ["release_memory_occupation is missing"])
    with caplog.at_level(logging.WARNING):
        memory_release.install([CHECKED])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("sglang-nsa-plugin: release_memory_occupation is missing. If this server")
