"""Each role in the shapes that servers have, beside SGLang's own fill of the same inputs."""

from __future__ import annotations

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    expect_equal_after_sglang_fill,
    make_pair,
    on_the_cpu,
    random_batch,
    replay_and_expect_equal,
    skip_unless_captured,
    step_and_expect_equal,
)

from sglang_nsa_plugin.harness.diff import Diff
from sglang_nsa_plugin.harness.inputs import random_step
from sglang_nsa_plugin.state import ALL_ROLES, STATES, record

pytestmark = [on_the_cpu, pytest.mark.parametrize("role", ALL_ROLES)]

NO_SPECULATION = "plain decode is that of a server without speculation"
ONE_STEP = "with one speculative step SGLang has no draft-decode backend"


def served(role):
    return STATES[role].replays


@pytest.mark.parametrize("draft_tokens", [2, 3, 4, 5, 6, 7])
def test_one_to_six_steps(role, draft_tokens, state):
    if (role, draft_tokens) == ("draft-decode", 2):
        pytest.skip(ONE_STEP)
    if role == "decode":
        pytest.skip(NO_SPECULATION)
    pair = make_pair(role=role, draft_tokens=draft_tokens)
    generator = torch.Generator().manual_seed(draft_tokens)
    for _ in range(8):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert served(role) == 8
    assert len(pair.ours.steps()) == (draft_tokens - 2 if role == "draft-decode" else 1)


def test_adaptive_speculation_has_backends_for_each_number_of_steps(role, state):
    """SGLang makes them while it serves, 5, 1 and 6 steps, and goes from one to another."""
    if role == "decode":
        pytest.skip(NO_SPECULATION)
    pairs = []
    generator = torch.Generator().manual_seed(1)
    for steps in (5, 1, 6):
        if (role, steps) != ("draft-decode", 1):
            pairs.append(make_pair(role=role, draft_tokens=steps + 1))
        for pair in pairs:
            for _ in range(2):
                step_and_expect_equal(pair, random_batch(pair, generator))
    assert served(role) == 2 * sum(range(1, len(pairs) + 1)) + (2 if role == "draft-decode" else 0)
    assert not STATES[role].fallbacks
    assert record()["roles"][role]["adapter"] == "in-graph"


def recapture(pair):
    for bs in pair.batch_sizes:
        pair.ours.capture_setup(bs)
        pair.theirs.capture_setup(bs)
        pair._replays[bs] = pair._capture(bs)


def test_graphs_that_are_captured_again_are_filled(role, state):
    """Before the server is in service: new tensors."""
    pair = make_pair(role=role)
    generator = torch.Generator().manual_seed(2)
    step_and_expect_equal(pair, random_batch(pair, generator))
    before = {bs: pair.metadata(bs) for bs in BATCH_SIZES}
    for one in (pair.ours, pair.theirs):
        one.init_state()
    assert not pair.fills().captured
    recapture(pair)
    for _ in range(6):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert served(role) == 7
    assert all(pair.captured(bs).metadata is pair.metadata(bs) is not before[bs] for bs in BATCH_SIZES)


def test_a_batch_size_with_several_graphs_has_one_fill(role, state):
    """As with LoRA and sampling variants, which share SGLang's metadata."""
    pair = make_pair(role=role)
    before = dict(pair.fills().captured)
    recapture(pair)
    assert all(pair.captured(bs) is before[bs] for bs in BATCH_SIZES)
    step_and_expect_equal(pair, random_batch(pair, torch.Generator().manual_seed(3)))
    assert served(role) == 1


@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_an_idle_rank_of_dp_attention_replays_padded_requests_alone(role, bs, state):
    pair = make_pair(role=role)
    generator = torch.Generator().manual_seed(4)
    step_and_expect_equal(pair, random_batch(pair, generator))
    random_step(pair.inputs, generator, 0, bs, pair.ours.draft_tokens, pair.ours.longest)
    assert step_and_expect_equal(pair, bs).compared["cache_seqlens"] >= bs
    assert served(role) == 2


def test_a_batch_over_the_captured_sizes_is_planned_by_sglang(role, state):
    """Without a graph, by its eager method, which the plugin does not hook; graphs go on after it."""
    skip_unless_captured(role)
    context = pytest.importorskip("sglang.srt.runtime_context", reason="0.5.13 has no such module")
    pair = make_pair(role=role)
    generator = torch.Generator().manual_seed(5)
    bs = random_batch(pair, generator, raw_bs=2)
    step_and_expect_equal(pair, bs)
    random_step(pair.inputs, generator, 3, 3, pair.ours.draft_tokens, pair.ours.longest - 8)
    for one in (pair.ours, pair.theirs):
        batch = one.capture_batch(3)
        batch.seq_lens_cpu = batch.seq_lens.clone()
        batch.extend_num_tokens = 3 * one.draft_tokens
        batch.extend_prefix_lens = (batch.seq_lens - one.draft_tokens).clamp(min=0)
        batch.extend_prefix_lens_cpu = batch.extend_prefix_lens.tolist()
        batch.req_to_token_pool = one.model_runner.req_to_token_pool
        parallel = context.get_parallel()
        with one.stub_process(), parallel.override(attn_cp_size=1, attn_cp_rank=0):
            one.backend.init_forward_metadata(batch)
    diff = Diff()
    for ours, theirs in zip(pair.ours.steps(), pair.theirs.steps(), strict=True):
        ours, theirs = ours.forward_metadata, theirs.forward_metadata
        assert ours is not pair.metadata(bs)
        diff.add("lengths", ours.dsa_cache_seqlens_int32, theirs.dsa_cache_seqlens_int32)
        diff.add("page_table_1", ours.page_table_1, theirs.page_table_1)
    assert (diff.first, served(role), dict(STATES[role].fallbacks)) == (None, 1, {})
    replay_and_expect_equal(pair, random_batch(pair, generator))
    assert served(role) == 2


def test_a_size_that_was_not_captured_goes_to_sglang(role, state):
    pair = make_pair(role=role)
    generator = torch.Generator().manual_seed(6)
    for one in (pair.ours, pair.theirs):
        one.capture_setup(3)
    random_step(pair.inputs, generator, 3, 3, pair.ours.draft_tokens, pair.ours.longest)
    pair.ours.replay(3)
    expect_equal_after_sglang_fill(pair, 3)
    assert (served(role), dict(STATES[role].fallbacks)) == (0, {})
