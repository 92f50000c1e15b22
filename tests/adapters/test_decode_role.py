"""Plain decode in the graph, on SGLang's real backend of a server without speculation and CPU tensors.

SGLang's own code fills a second backend over the same inputs, and every live value is compared. At each
replay the runner passes new slices of its buffers, as SGLang's does.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    CPU,
    expect_equal_after_sglang_fill,
    expect_every_replay_to_be_checked,
    expect_prefills_impl_as_sglang_leaves_it,
    expect_sglang_to_take,
    expect_the_error_to_be_found,
    functions_of_a_known_replay,
    make_pair,
    on_the_cpu,
    plan_and_expect_nothing_written,
    plant_error,
    random_batch,
    replay_and_expect_equal,
    skip_unless_captured,
    step_and_expect_equal,
)
from test_switch import ask

from sglang_nsa_plugin.adapters import install, supported, taken_over
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.dispatch import BackendUnavailableError
from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.options import DEFAULT_ROLES
from sglang_nsa_plugin.state import DECODE, DECODE_STATE, VERIFY_STATE, record

pytestmark = on_the_cpu


@pytest.fixture
def pair(state):
    return make_decode()


def make_decode(backend: str = "auto", **harness: object):
    return make_pair(backend, role=DECODE, **harness)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "harness",
    [{}, {"page_size": 1}, {"index_topk": 100}, {"page_size": 16, "context_len": 1_001}],
    ids=str,
)
def test_every_value_equals_sglangs_fill(backend, harness, state):
    pair = make_decode(backend, **harness)
    assert pair.ours.backend.speculative_num_draft_tokens is None
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert (DECODE_STATE.adapter, DECODE_STATE.replays) == ("in-graph", 30)
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert not DECODE_STATE.fallbacks
    assert (state.replays, state.reason) == (0, "--nsa-metadata-roles leaves it out")


def test_lengths_are_those_of_the_batch_one_row_for_each_request(pair):
    pair.inputs.seq_lens[:2].copy_(torch.tensor([100, 7]))
    pair.replay(2)
    metadata = pair.metadata(2)
    assert metadata.cache_seqlens_int32.tolist() == [100, 7]
    assert metadata.cu_seqlens_k.tolist() == [0, 100, 107]
    assert metadata.dsa_seqlens_expanded is metadata.cache_seqlens_int32
    assert metadata.real_page_table.shape[0] == 2


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices"])
@pytest.mark.parametrize("known", [False, True])
def test_replaced_inputs_go_through_sglang(pair, name, known, caplog):
    generator = torch.Generator().manual_seed(6)
    bs = random_batch(pair, generator, raw_bs=4)
    if known:
        step_and_expect_equal(pair, bs)
    view = pair.ours.replay_view(bs)
    captured = getattr(pair.inputs, name)
    setattr(view, name, captured[:bs].clone())
    kept = captured.clone()
    captured.fill_(1)  # what the captured fill would read
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    pair.replay_graph(bs)
    captured.copy_(kept)
    expect_equal_after_sglang_fill(pair, bs)
    assert DECODE_STATE.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}
    assert "SGLang filled this decode step" in caplog.text
    step_and_expect_equal(pair, bs)
    assert DECODE_STATE.replays == 1 + known


@pytest.mark.parametrize(
    "change", ["another mode", "in capture", "seq_lens", "req_pool_indices", "req_to_token"]
)
def test_a_known_batch_size_is_looked_at_all_the_same(pair, change):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    expect_sglang_to_take(pair, change, ForwardMode.TARGET_VERIFY)


def test_a_known_batch_size_leaves_prefills_impl_as_sglang_would(pair):
    expect_prefills_impl_as_sglang_leaves_it(pair)


def test_a_replay_with_new_slices_enters_one_function_of_ours(pair):
    """Validation costs several times as much, in each step."""
    assert functions_of_a_known_replay(pair) == ["_out_graph"]
    assert DECODE_STATE.replays == 2


def test_only_the_targets_backend_is_taken_over(pair):
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    with pair.stub_process():
        runner = pair.ours.model_runner
        assert taken_over.ATTRIBUTE in vars(DeepseekSparseAttnBackend(runner))
        runner.is_draft_worker = True
        assert taken_over.ATTRIBUTE not in vars(DeepseekSparseAttnBackend(runner))


# --- the wide table ---


@pytest.mark.parametrize("wide_tables", ["auto", "keep"])
def test_the_wide_table_is_sglangs_decision_and_no_saving_of_the_plugins(
    wide_tables, state, monkeypatch
):
    pair = make_decode(wide_tables=wide_tables)
    from sglang.srt.layers.attention import dsa_backend

    assert pair.metadata(2).page_table_1 is not None  # on the CPU SGLang keeps it
    backend = pair.ours.backend
    monkeypatch.setattr(type(backend.dsa_topk_backend), "should_use_topk_v2", lambda _: True)
    monkeypatch.setattr(dsa_backend, "is_cuda", lambda: True)
    backend.use_fused_topk = True
    pair.ours.init_state()
    assert backend.dsa_drop_wide_page_table
    assert DECODE_STATE.bytes_saved == 0


# --- the switch ---


@pytest.mark.parametrize("key", ["nsa_metadata", "nsa_metadata_decode"])
def test_off_hands_every_step_to_sglang_and_on_takes_it_back(pair, key):
    generator = torch.Generator().manual_seed(1)
    for round_ in (1, 2):
        for _ in range(3):
            step_and_expect_equal(pair, random_batch(pair, generator))
        assert ask(**{key: 0})
        assert not record()["roles"][DECODE]["switched_on"]
        for _ in range(2):
            replay_and_expect_equal(pair, random_batch(pair, generator))
        assert DECODE_STATE.replays == 3 * round_
        assert DECODE_STATE.fallbacks == {FallbackReason.SWITCHED_OFF.value: 2 * round_}
        assert ask(**{key: 1})


def test_a_captured_fill_that_is_switched_off_writes_nothing(pair):
    bs = random_batch(pair, torch.Generator().manual_seed(2))
    step_and_expect_equal(pair, bs)
    ask(nsa_metadata_decode=0)
    plan_and_expect_nothing_written(pair, bs)


# --- the shadow check ---


def test_every_replay_is_checked_before_the_next_and_equal(state):
    expect_every_replay_to_be_checked(make_decode(check_every=1), least_values=17 * 25)


@pytest.mark.parametrize(
    "field", ["cu_seqlens_k", "dsa_cache_seqlens_int32", "page_table_1", "real_page_table"]
)
def test_a_planted_error_is_found_and_sglang_takes_over(field, state, monkeypatch, caplog):
    plant_error(field, monkeypatch)
    expect_the_error_to_be_found(make_decode(check_every=1), field, caplog)


# --- what stays with SGLang ---


@pytest.mark.parametrize(
    ("backend", "server_args", "said"),
    [
        ({}, {}, None),
        ({}, {"enable_two_batch_overlap": True}, "two-batch overlap (enable_two_batch_overlap) is not"),
        ({}, {"enable_pdmux": True}, "PD multiplexing (enable_pdmux) is not supported"),
        ({}, {"enable_hisparse": True}, "HiSparse (enable_hisparse) is not supported"),
        ({}, {"dcp_size": 2}, "decode context parallelism (dcp_size 2) is not supported"),
        ({"dsa_index_kpool": 4}, {}, "index k-pooling (4) is not supported"),
        (
            {"shared_read_ends": lambda mode: SimpleNamespace(name="PRE_REPLAY")},
            {},
            "DeepseekSparseAttnBackend frees req_to_token before the replay",
        ),
        (
            {},
            {"cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="breakable"))},
            "breakable CUDA graphs are not supported, only full ones",
        ),
    ],
)
def test_configurations_that_stay_with_sglang(pair, monkeypatch, backend, server_args, said):
    for name, value in backend.items():
        monkeypatch.setattr(pair.ours.backend, name, value, raising=False)
    runner = SimpleNamespace(server_args=process_stubs.publish_server_args(**server_args))
    why_not = supported.why_decode_unsupported(pair.ours.backend, runner)
    assert why_not == said if said is None else why_not.startswith(said)


def test_a_backend_that_is_declined_says_so_and_ends_a_start_by_name(state):
    skip_unless_captured(DECODE)
    from sglang_nsa_plugin.harness.graph_backend import GraphBackend

    process_stubs.activate_plugin("auto", 0, DECODE)
    declined = GraphBackend(CPU, role=DECODE, enable_two_batch_overlap=True)
    assert taken_over.ATTRIBUTE not in vars(declined.backend)
    assert DECODE_STATE.reason.startswith("two-batch overlap")
    process_stubs.activate_plugin("torch", 0, DECODE)
    with pytest.raises(BackendUnavailableError, match="two-batch overlap"):
        GraphBackend(CPU, role=DECODE, enable_two_batch_overlap=True)


def test_a_release_that_frees_req_to_token_before_the_replay_says_so(state, monkeypatch):
    """As 0.5.14 to 0.5.17; those before have no graph that is filled, or no event for it."""
    released = supported.why_no_decode_fence() is None
    if released:
        unknown = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.none"
        monkeypatch.setattr(supported, "READ_ENDS", supported.Call(unknown, ("self",)))
    process_stubs.activate_plugin("auto", 0, DECODE)
    assert DECODE_STATE.reason.startswith("decode is filled from SGLang 0.5.18 on")
    assert taken_over.TAKEOVERS[DECODE].request is None
    with pytest.raises(BackendUnavailableError, match=r"from SGLang 0\.5\.18 on"):
        process_stubs.activate_plugin("torch", 0, DECODE)


# --- who gets it ---


def test_it_is_filled_where_it_is_named_and_the_log_says_what_was_tried(state, caplog):
    skip_unless_captured(DECODE)
    assert DECODE not in DEFAULT_ROLES
    assert set(install.adapter_for_installed().untried) == {DECODE}
    why_not = install.why_role_misfits(install.adapter_for_installed(), DECODE)
    assert why_not.startswith("on a GPU, only SGLang 0.5.23 has served")
    assert why_not.endswith("start with --nsa-metadata-roles decode")
    with caplog.at_level(logging.WARNING):
        make_decode()
    (line,) = [each for each in caplog.messages if "asked for by name" in each]
    assert line.startswith("sglang-nsa-plugin: decode is filled because it was asked for by name")


def test_a_server_with_speculation_says_that_it_has_none_and_fills_the_others(state, caplog):
    skip_unless_captured()
    from sglang_nsa_plugin import options, plugin

    server_args = SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="dsa")
    setattr(server_args, options.ATTRIBUTE, "torch")  # by name: no error all the same
    setattr(server_args, options.ROLES_ATTRIBUTE, ("verify", DECODE))
    with caplog.at_level(logging.INFO):
        plugin.activate(server_args)
    assert DECODE_STATE.reason == install.NO_PLAIN_DECODE
    assert VERIFY_STATE.reason == "waiting for the attention backend"
    assert f"not used: {install.NO_PLAIN_DECODE}; SGLang fills decode metadata itself" in caplog.text


def test_a_server_without_speculation_says_so_of_the_other_roles(state, caplog):
    skip_unless_captured(DECODE)
    from sglang_nsa_plugin import options, plugin

    server_args = SimpleNamespace(speculative_algorithm=None, attention_backend="dsa")
    setattr(server_args, options.ATTRIBUTE, "torch")
    setattr(server_args, options.ROLES_ATTRIBUTE, ("draft-extend", "verify", DECODE))
    with caplog.at_level(logging.INFO):
        plugin.activate(server_args)
    assert DECODE_STATE.reason == "waiting for the attention backend"
    said = f"not used: {install.NO_SPECULATION}; SGLang fills draft-extend, verify metadata itself"
    assert said in caplog.text


def test_without_the_role_a_server_without_speculation_is_left_alone(state):
    skip_unless_captured(DECODE)
    from sglang_nsa_plugin import plugin
    from sglang_nsa_plugin.harness.graph_backend import GraphBackend

    taken_over.TAKEOVERS[DECODE].arm(None)  # an earlier test's; a server's process has no earlier start
    plugin.activate(SimpleNamespace(speculative_algorithm=None, attention_backend="dsa"))
    backend = GraphBackend(CPU, role=DECODE).backend
    assert taken_over.ATTRIBUTE not in vars(backend)
    assert DECODE not in record()["roles"]
    assert {each["reason"] for each in record()["roles"].values()} == {install.NO_SPECULATION}
