"""Draft-decode in the graph, on SGLang's real multi-step backend and CPU tensors.

SGLang's own code fills a second multi-step backend over the same inputs, and every live value of every
draft step is compared. At each replay the runner passes the batch's own tensors, as SGLang's does.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    expect_equal,
    expect_every_replay_to_be_checked,
    expect_the_error_to_be_found,
    make_pair,
    on_the_cpu,
    plan_and_expect_nothing_written,
    plant_error,
    random_batch,
    replay_and_expect_equal,
    step_and_expect_equal,
)
from test_switch import ask

from sglang_nsa_plugin.adapters import draft_decode, mqa_schedule, supported, taken_over
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.state import DRAFT_DECODE_STATE, STATE, record

pytestmark = on_the_cpu


@pytest.fixture
def pair(state):
    return make()


def make(backend: str = "auto", **harness: object):
    return make_pair(backend, role="draft-decode", **harness)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "harness",
    [
        {},
        {"page_size": 1},
        {"draft_tokens": 3},
        {"draft_tokens": 6, "index_topk": 100},
        {"page_size": 16, "context_len": 1_001},
    ],
    ids=str,
)
def test_every_value_of_every_draft_step_equals_sglangs_fill(backend, harness, state):
    pair = make(backend, **harness)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert (DRAFT_DECODE_STATE.adapter, DRAFT_DECODE_STATE.replays) == ("in-graph", 30)
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert not DRAFT_DECODE_STATE.fallbacks
    assert STATE.replays == 0


def test_all_draft_steps_share_one_metadata_object(pair):
    for bs in BATCH_SIZES:
        first, *others = pair.ours.metadata(bs)
        assert others
        assert all(other is first for other in others)
        assert pair.theirs.metadata(bs)[0] is not pair.theirs.metadata(bs)[1]
    bs = random_batch(pair, torch.Generator().manual_seed(2))
    for step in pair.ours.steps():
        step.forward_metadata = None
    pair.replay(bs)
    assert all(step.forward_metadata is pair.metadata(bs) for step in pair.ours.steps())


@pytest.mark.parametrize("known", [False, True])
def test_a_known_batch_size_costs_one_function(pair, known, monkeypatch):
    bs = random_batch(pair, torch.Generator().manual_seed(3))
    if known:
        step_and_expect_equal(pair, bs)
    entered = []
    slow_path = draft_decode._slow_path
    monkeypatch.setattr(
        draft_decode, "_slow_path", lambda *args: (entered.append("slow"), slow_path(*args))
    )
    step_and_expect_equal(pair, bs)
    assert entered == ([] if known else ["slow"])
    assert DRAFT_DECODE_STATE.replays == 1 + known


def test_inputs_that_the_runner_did_not_copy_go_to_sglang(pair, caplog, monkeypatch):
    """The graph reads the runner's buffers, so they must hold what the batch has."""
    bs = random_batch(pair, torch.Generator().manual_seed(4), raw_bs=2)
    view = pair.ours.replay_view(bs)
    view.seq_lens += 1
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    pair.replay_graph(bs)
    assert DRAFT_DECODE_STATE.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}
    assert "SGLang filled this draft-decode step" in caplog.text
    assert pair.metadata(bs).cache_seqlens_int32.tolist() == view.seq_lens.tolist()
    monkeypatch.setattr(torch, "equal", None)  # the host waits for one comparison, and no more
    replay_and_expect_equal(pair, bs)
    assert DRAFT_DECODE_STATE.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 2}
    assert DRAFT_DECODE_STATE.replays == 0


def test_slices_of_the_buffers_prove_nothing_about_copies(pair):
    """A padded batch's tensors are the captured ones."""
    bs = random_batch(pair, torch.Generator().manual_seed(5), raw_bs=2)
    view = pair.ours.replay_view(bs)
    view.seq_lens, view.req_pool_indices = (
        pair.inputs.seq_lens[:bs],
        pair.inputs.req_pool_indices[:bs],
    )
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    assert DRAFT_DECODE_STATE.replays == 1
    assert not getattr(pair.ours.backend, taken_over.FAST_PATH)


def test_another_req_to_token_goes_to_sglang(pair):
    bs = random_batch(pair, torch.Generator().manual_seed(6), raw_bs=2)
    step_and_expect_equal(pair, bs)
    first = pair.ours.steps()[0]
    first.req_to_token = first.req_to_token.clone()
    pair.ours.replay(bs)
    assert DRAFT_DECODE_STATE.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}


# --- the switch ---


@pytest.mark.parametrize("draft_tokens", [4, 6])
@pytest.mark.parametrize("key", ["nsa_metadata", "nsa_metadata_draft_decode"])
def test_off_hands_every_step_to_sglang_and_on_takes_it_back(key, draft_tokens, state):
    pair = make(draft_tokens=draft_tokens)
    generator = torch.Generator().manual_seed(1)
    for round_ in (1, 2):
        for _ in range(3):
            step_and_expect_equal(pair, random_batch(pair, generator))
        assert ask(**{key: 0})
        assert not record()["roles"]["draft-decode"]["switched_on"]
        for _ in range(2):
            replay_and_expect_equal(pair, random_batch(pair, generator))
        assert DRAFT_DECODE_STATE.replays == 3 * round_
        assert DRAFT_DECODE_STATE.fallbacks == {FallbackReason.SWITCHED_OFF.value: 2 * round_}
        assert ask(**{key: 1})


def test_a_captured_fill_that_is_switched_off_writes_nothing(pair):
    bs = random_batch(pair, torch.Generator().manual_seed(2))
    step_and_expect_equal(pair, bs)
    ask(nsa_metadata_draft_decode=0)
    plan_and_expect_nothing_written(pair, bs)


@pytest.mark.parametrize("steps", [3, 5])
def test_off_refreshes_the_schedule_where_sglang_leaves_it(steps, state, monkeypatch):
    """With more than three steps the schedule would be that of the last replay, for other lengths."""
    pair = make(draft_tokens=steps + 1)
    bs = random_batch(pair, torch.Generator().manual_seed(7))
    step_and_expect_equal(pair, bs)
    first, metadata = pair.ours.steps()[0], pair.metadata(bs)
    refreshed = []
    monkeypatch.setattr(
        mqa_schedule, "refresh", lambda backend, metadata, lengths: refreshed.append(backend)
    )
    object.__setattr__(metadata, "paged_mqa_schedule_metadata", torch.zeros(1))
    ask(nsa_metadata_draft_decode=0)
    leaves_it = lambda multi_step, batch: None  # noqa: E731  # as SGLang does with more steps
    draft_decode._out_graph(leaves_it, pair.ours.backend, pair.ours.replay_view(bs))
    assert refreshed == ([first] if steps > 3 else [])


def test_off_plans_one_step_where_the_wide_table_is_left_out(pair, monkeypatch):
    """SGLang's fill of all steps copies a wide table."""
    bs = random_batch(pair, torch.Generator().manual_seed(7))
    step_and_expect_equal(pair, bs)
    first, metadata = pair.ours.steps()[0], pair.metadata(bs)
    planned = []
    monkeypatch.setattr(
        type(first), "_apply_cuda_graph_metadata", lambda self, **_: planned.append(self)
    )
    object.__setattr__(metadata, "page_table_1", None)
    for step in pair.ours.steps():
        step.forward_metadata = None
    ask(nsa_metadata_draft_decode=0)
    pair.ours.replay(bs)
    assert planned == [first]
    assert all(step.forward_metadata is metadata for step in pair.ours.steps())


# --- the shadow check ---


@pytest.mark.parametrize("draft_tokens", [4, 6])
def test_every_replay_is_checked_before_the_next_and_equal(draft_tokens, state):
    expect_every_replay_to_be_checked(
        make(check_every=1, draft_tokens=draft_tokens), least_values=17 * 20
    )


@pytest.mark.parametrize(
    "field", ["cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table"]
)
def test_a_planted_error_is_found_and_sglang_takes_over(field, state, monkeypatch, caplog):
    plant_error(field, monkeypatch)
    expect_the_error_to_be_found(make(check_every=1), field, caplog)


def test_inputs_that_stop_being_copied_are_found(state):
    """The replay itself cannot see it."""
    pair = make(check_every=1)
    generator = torch.Generator().manual_seed(8)
    bs = random_batch(pair, generator, raw_bs=2)
    replay_and_expect_equal(pair, bs)
    for _ in range(3):
        view = pair.ours.replay_view(bs)
        view.seq_lens += 1
        with pair.stub_process():
            pair.ours.backend.init_forward_metadata_out_graph(view)
        pair.replay_graph(bs)
    assert DRAFT_DECODE_STATE.first_mismatch.startswith("cache_seqlens_int32[")


# --- errors ---


def test_an_error_in_service_leaves_the_steps_to_sglang(pair, monkeypatch):
    generator = torch.Generator().manual_seed(9)
    bs = random_batch(pair, generator)
    step_and_expect_equal(pair, bs)
    captured = dict(pair.fills().captured)
    getattr(pair.ours.backend, taken_over.FAST_PATH).clear()
    monkeypatch.setattr(pair.fills(), "validate", None)
    bs = random_batch(pair, generator)
    pair.ours.replay(bs)
    assert OUTCOMES["draft-decode"].has_failed
    pair.theirs.sglang_fill(bs)
    pair.inputs.seq_lens.fill_(7)  # what a fill that still ran would read
    captured[bs].run()
    expect_equal(pair, bs)
    assert taken_over.ATTRIBUTE not in vars(pair.ours.backend)


# --- what stays with SGLang ---


@pytest.mark.parametrize(
    ("multi_step", "server_args", "said"),
    [
        ({}, {}, None),
        ({"attn_backends": []}, {}, "with one speculative step SGLang has no draft-decode graph"),
        ({"topk": 4}, {}, "draft trees (--speculative-eagle-topk 4) are not supported, only chains"),
        (
            {},
            {"speculative_algorithm": "DFLASH"},
            "draft-decode is filled with EAGLE, EAGLE3, NEXTN alone, not with DFLASH",
        ),
        ({}, {"enable_two_batch_overlap": True}, "two-batch overlap (enable_two_batch_overlap) is not"),
    ],
)
def test_configurations_that_stay_with_sglang(pair, monkeypatch, multi_step, server_args, said):
    for name, value in multi_step.items():
        monkeypatch.setattr(pair.ours.backend, name, value)
    settings = {"speculative_algorithm": "EAGLE", **server_args}
    runner = SimpleNamespace(server_args=process_stubs.publish_server_args(**settings))
    why_not = supported.why_draft_decode_unsupported(pair.ours.backend, runner)
    assert why_not == said if said is None else why_not.startswith(said)


def test_without_the_role_the_draft_steps_stay_with_sglang(state):
    pair = make_pair()
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnMultiStepBackend

    with pair.stub_process():
        multi_step = DeepseekSparseAttnMultiStepBackend(pair.ours.model_runner, 1, 3)
        multi_step.init_cuda_graph_state(4, 4)
    assert taken_over.ATTRIBUTE not in vars(multi_step)
    first, second = multi_step.attn_backends
    assert first.decode_cuda_graph_metadata is not second.decode_cuda_graph_metadata
