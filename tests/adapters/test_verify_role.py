"""Target-verify in the graph, on SGLang's real backend of the target model and CPU tensors.

SGLang's own code fills a second backend over the same inputs, and every live value is compared. At each
replay the runner passes new slices of its buffers, as SGLang's does.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
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
from sglang_nsa_plugin.adapters.adapter import Request
from sglang_nsa_plugin.adapters.captured_fill import BackendFills
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.dispatch import BackendUnavailableError
from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.state import STATE, VERIFY_STATE, record

pytestmark = on_the_cpu


@pytest.fixture
def pair(state):
    return make_verify()


def make_verify(backend: str = "auto", **harness: object):
    return make_pair(backend, role="verify", **harness)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "harness",
    [
        {},
        {"page_size": 1},
        {"draft_tokens": 1},
        {"draft_tokens": 6, "index_topk": 100},
        {"page_size": 16, "context_len": 1_001},
    ],
    ids=str,
)
def test_every_value_equals_sglangs_fill(backend, harness, state):
    pair = make_verify(backend, **harness)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert (VERIFY_STATE.adapter, VERIFY_STATE.replays) == ("in-graph", 30)
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert not VERIFY_STATE.fallbacks
    assert (state.replays, state.reason) == (0, "--nsa-metadata-roles leaves it out")


def test_lengths_count_the_draft_tokens_that_the_batch_does_not(pair):
    pair.inputs.seq_lens[:1].fill_(100)
    pair.replay(1)
    metadata = pair.metadata(1)
    assert metadata.cache_seqlens_int32.tolist() == [104]
    assert metadata.dsa_seqlens_expanded.tolist() == [101, 102, 103, 104]


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
    assert VERIFY_STATE.fallbacks == {FallbackReason.INPUTS_REPLACED.value: 1}
    assert not STATE.fallbacks
    assert "SGLang filled this verify step" in caplog.text
    step_and_expect_equal(pair, bs)
    assert VERIFY_STATE.replays == 1 + known


@pytest.mark.parametrize(
    "change", ["another mode", "in capture", "seq_lens", "req_pool_indices", "req_to_token"]
)
def test_a_known_batch_size_is_looked_at_all_the_same(pair, change):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    expect_sglang_to_take(pair, change, ForwardMode.DECODE)


def test_a_known_batch_size_leaves_prefills_impl_as_sglang_would(pair):
    expect_prefills_impl_as_sglang_leaves_it(pair)


def test_a_replay_with_new_slices_enters_one_function_of_ours(pair):
    """Validation costs several times as much, in each step."""
    assert functions_of_a_known_replay(pair) == ["_out_graph"]
    assert VERIFY_STATE.replays == 2


def test_only_the_targets_backend_is_taken_over(pair):
    """Draft-decode's and draft-extend's backends belong to the draft model."""
    from sglang.srt.layers.attention.dsa_backend import (
        DeepseekSparseAttnBackend,
        DeepseekSparseAttnMultiStepBackend,
    )

    with pair.stub_process():
        runner = pair.ours.model_runner
        assert taken_over.ATTRIBUTE in vars(DeepseekSparseAttnBackend(runner))
        step = DeepseekSparseAttnBackend(runner, speculative_num_steps=3)
        assert taken_over.ATTRIBUTE not in vars(step)
        runner.is_draft_worker = True
        assert taken_over.ATTRIBUTE not in vars(DeepseekSparseAttnBackend(runner))
        for child in DeepseekSparseAttnMultiStepBackend(runner, 1, 3).attn_backends:
            assert taken_over.ATTRIBUTE not in vars(child)


def test_without_the_role_the_target_stays_with_sglang(state):
    """Where ``--nsa-metadata-roles`` leaves verify out."""
    skip_unless_captured()
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    pair = make_pair()
    runner = pair.ours.model_runner
    runner.is_draft_worker = False
    with pair.stub_process():
        assert taken_over.ATTRIBUTE not in vars(DeepseekSparseAttnBackend(runner))
    assert list(record()["roles"]) == ["draft-extend"]


# --- the switch ---


@pytest.mark.parametrize("key", ["nsa_metadata", "nsa_metadata_verify"])
def test_off_hands_every_step_to_sglang_and_on_takes_it_back(pair, key):
    generator = torch.Generator().manual_seed(1)
    for round_ in (1, 2):
        for _ in range(3):
            step_and_expect_equal(pair, random_batch(pair, generator))
        assert ask(**{key: 0})
        assert not record()["roles"]["verify"]["switched_on"]
        for _ in range(2):
            replay_and_expect_equal(pair, random_batch(pair, generator))
        assert VERIFY_STATE.replays == 3 * round_
        assert VERIFY_STATE.fallbacks == {FallbackReason.SWITCHED_OFF.value: 2 * round_}
        assert ask(**{key: 1})


def test_a_captured_fill_that_is_switched_off_writes_nothing(pair):
    bs = random_batch(pair, torch.Generator().manual_seed(2))
    step_and_expect_equal(pair, bs)
    ask(nsa_metadata_verify=0)
    plan_and_expect_nothing_written(pair, bs)


def test_a_key_of_another_role_is_refused_and_changes_nothing(pair, caplog):
    ask(nsa_metadata_draft_extend=0)
    assert record()["roles"]["verify"]["switched_on"]
    assert "the plugin fills nothing here: --nsa-metadata-roles leaves it out" in caplog.text


# --- the shadow check ---


def test_every_replay_is_checked_before_the_next_and_equal(state):
    expect_every_replay_to_be_checked(make_verify(check_every=1), least_values=17 * 100)


@pytest.mark.parametrize(
    "field", ["cu_seqlens_k", "dsa_seqlens_expanded", "page_table_1", "real_page_table"]
)
def test_a_planted_error_is_found_and_sglang_takes_over(field, state, monkeypatch, caplog):
    plant_error(field, monkeypatch)
    expect_the_error_to_be_found(make_verify(check_every=1), field, caplog)


def test_a_capture_in_between_leaves_out_the_comparison(state):
    """It writes over the metadata of the last replay, which is no difference."""
    pair = make_verify(check_every=1)
    generator = torch.Generator().manual_seed(4)
    bs = random_batch(pair, generator, raw_bs=2)
    pair.replay(bs)
    random_batch(pair, generator, raw_bs=2)
    pair.ours.capture_setup(bs)
    for _ in range(3):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    assert (VERIFY_STATE.checks, VERIFY_STATE.mismatches) == (2, 0)


def test_a_difference_is_told_though_verify_was_switched_off_meanwhile(state):
    """The last replay is compared in the next step, whoever fills that."""
    pair = make_verify(check_every=1)
    generator = torch.Generator().manual_seed(5)
    bs = random_batch(pair, generator)
    pair.replay(bs)
    pair.metadata(bs).cache_seqlens_int32.add_(1)
    assert ask(nsa_metadata_verify=0)
    for _ in range(3):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    assert VERIFY_STATE.first_mismatch.startswith("cache_seqlens_int32[")
    assert OUTCOMES["verify"].has_failed
    assert VERIFY_STATE.fallbacks == {"the shadow check found a difference": 3}


# --- two roles in one process ---


def make_both():
    """A target's backend and a draft's, both taken over, as in a server that asks for both roles."""
    verify = make_verify()
    requested = taken_over.TAKEOVERS["verify"].request
    draft_extend = make_pair()
    taken_over.TAKEOVERS["verify"].arm(requested)
    return verify, draft_extend


def test_roles_are_counted_switched_and_filled_apart(state):
    verify, draft_extend = make_both()
    generator = torch.Generator().manual_seed(5)
    for pair in (verify, verify, draft_extend):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert ask(nsa_metadata_verify=0)
    for pair in (verify, draft_extend):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    found = record()
    replays = {role: of_role["replays"] for role, of_role in found["roles"].items()}
    assert replays == {"draft-extend": 2, "verify": 2}
    assert found["replays"] == 2
    assert not found["fallbacks"]
    assert ask(nsa_metadata=1)
    assert all(of_role["switched_on"] for of_role in record()["roles"].values())


def test_an_error_while_verify_is_set_up_leaves_draft_extend(state, monkeypatch, caplog):
    draft_extend = make_pair()
    args = BackendFills._args

    def failing(fills, batch, metadata):
        if fills.role.name == "verify":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return args(fills, batch, metadata)

    monkeypatch.setattr(BackendFills, "_args", failing)
    caplog.set_level(logging.INFO)
    verify = make_verify()
    assert taken_over.ATTRIBUTE not in vars(verify.ours.backend)
    assert "OutOfMemoryError" in VERIFY_STATE.reason
    assert "SGLang fills verify metadata itself" in caplog.text
    generator = torch.Generator().manual_seed(6)
    bs = random_batch(verify, generator)
    verify.ours.replay(bs)
    verify.theirs.sglang_fill(bs)
    step_and_expect_equal(draft_extend, random_batch(draft_extend, generator))
    assert (STATE.replays, VERIFY_STATE.replays) == (1, 0)


def test_an_error_of_verify_in_service_leaves_draft_extend(state, monkeypatch):
    verify, draft_extend = make_both()
    generator = torch.Generator().manual_seed(7)
    monkeypatch.setattr(verify.fills(), "validate", None)
    captured = dict(verify.fills().captured)
    bs = random_batch(verify, generator)
    verify.ours.replay(bs)
    assert OUTCOMES["verify"].has_failed
    kept = verify.inputs.seq_lens.clone()
    verify.inputs.seq_lens.fill_(7)  # what a fill that still ran would read
    captured[bs].run()
    verify.inputs.seq_lens.copy_(kept)
    expect_equal_after_sglang_fill(verify, bs)
    step_and_expect_equal(draft_extend, random_batch(draft_extend, generator))
    assert not OUTCOMES["draft-extend"].has_failed


# --- what stays with SGLang ---


@pytest.mark.parametrize(
    ("backend", "server_args", "said"),
    [
        ({}, {}, None),
        ({}, {"speculative_algorithm": "NEXTN"}, None),
        (
            {},
            {"speculative_algorithm": "DFLASH"},
            "verify is filled with EAGLE, EAGLE3, NEXTN alone, not with DFLASH",
        ),
        ({}, {"enable_two_batch_overlap": True}, "two-batch overlap (enable_two_batch_overlap) is not"),
        ({}, {"enable_pdmux": True}, "PD multiplexing (enable_pdmux) is not supported"),
        ({}, {"enable_hisparse": True}, "HiSparse (enable_hisparse) is not supported"),
        ({}, {"dcp_size": 2}, "decode context parallelism (dcp_size 2) is not supported"),
        ({}, {"enable_multi_layer_eagle": True}, "the multi-layer EAGLE runner is not supported"),
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
    runner = runner_of(**server_args)
    why_not = supported.why_verify_unsupported(pair.ours.backend, runner)
    assert why_not == said if said is None else why_not.startswith(said)


def runner_of(**server_args: object) -> SimpleNamespace:
    settings = {"speculative_algorithm": "EAGLE", **server_args}
    return SimpleNamespace(server_args=process_stubs.publish_server_args(**settings))


@pytest.mark.parametrize(
    "variable", ["SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "SGLANG_ENABLE_METADATA_GLUE_GRAPH"]
)
def test_what_goes_past_the_hook_stays_with_sglang(pair, variable, monkeypatch):
    from sglang.srt import environ

    if hasattr(environ.envs, variable):
        monkeypatch.setenv(variable, "1")
    else:  # an earlier release
        switch = SimpleNamespace(get=lambda: True)
        monkeypatch.setattr(environ, "envs", SimpleNamespace(**{variable: switch}))
    why_not = supported.why_verify_unsupported(pair.ours.backend, runner_of())
    assert why_not.startswith(f"{variable} is not supported")


def test_context_lengths_that_change_their_layout_are_refused(pair):
    """[requests, draft tokens] are SM100's: tests/adapters/test_by_request.py."""
    metadata = pair.metadata(2)
    object.__setattr__(metadata, "paged_mqa_ctx_lens_2d", torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"paged_mqa_ctx_lens_2d: must be \[8, 1\], .* got \[2, 4\]"):
        pair.fills()._args(pair.ours.capture_batch(2), metadata)


def test_a_backend_that_is_declined_says_so_and_ends_a_start_by_name(state):
    skip_unless_captured("verify")
    from sglang_nsa_plugin.harness.graph_backend import GraphBackend

    process_stubs.activate_plugin("auto", 0, "verify")
    declined = GraphBackend(CPU, role="verify", enable_two_batch_overlap=True)
    assert taken_over.ATTRIBUTE not in vars(declined.backend)
    assert VERIFY_STATE.reason.startswith("two-batch overlap")
    process_stubs.activate_plugin("torch", 0, "verify")
    with pytest.raises(BackendUnavailableError, match="two-batch overlap"):
        GraphBackend(CPU, role="verify", enable_two_batch_overlap=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_adapter_without_the_role_leaves_it_to_sglang(backend, state, monkeypatch):
    """As that of SGLang up to 0.5.12."""
    installed = install.adapter_for_installed()
    takeovers = {"draft-extend": installed.takeovers["draft-extend"]}
    older = dataclasses.replace(installed, takeovers=takeovers)
    monkeypatch.setattr(install, "adapter_for_installed", lambda: older)
    by_name = pytest.raises(BackendUnavailableError) if backend == "torch" else nullcontext()
    with by_name as ended:
        install.install(dict.fromkeys(["draft-extend", "verify"], Request(backend, 0)))
    why_not = "with this SGLang release the plugin fills no verify metadata"
    assert why_not in (str(ended.value) if ended else VERIFY_STATE.reason)
    assert takeovers["draft-extend"].request is not None
