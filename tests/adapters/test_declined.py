"""What the in-graph adapter leaves to SGLang, and the configuration that it asks."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import CPU, make_pair, on_the_cpu, skip_unless_captured

pytestmark = on_the_cpu


@pytest.fixture
def pair():
    return make_pair()


@pytest.mark.parametrize(
    ("backend", "server_args", "said"),
    [
        ({}, {"enable_multi_layer_eagle": True}, "the multi-layer EAGLE runner is not supported"),
        (
            {},
            {"cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="breakable"))},
            "breakable CUDA graphs are not supported, only full ones",
        ),
        ({"dsa_index_kpool": 1}, {"enable_multi_layer_eagle": False}, None),
    ],
)
def test_configurations_that_stay_with_sglang(pair, monkeypatch, backend, server_args, said):
    """F10 and others: declined with the reason."""
    from sglang_nsa_plugin.adapters import supported

    for name, value in backend.items():
        monkeypatch.setattr(pair.ours.backend, name, value, raising=False)
    assert supported.why_draft_extend_unsupported(pair.ours.backend, model_runner(**server_args)) == said


def model_runner(**server_args: object) -> SimpleNamespace:
    from sglang_nsa_plugin.harness import process_stubs

    published = process_stubs.publish_server_args(**server_args)
    return SimpleNamespace(server_args=published, war_fastpath_read_done_event=None)


def test_a_runner_whose_fence_is_unknown_stays_with_sglang(pair):
    """Nothing else could tell the scheduler when the read inside the replay has ended."""
    from sglang_nsa_plugin.adapters import supported

    said = supported.why_draft_extend_unsupported(
        pair.ours.backend, SimpleNamespace(server_args=SimpleNamespace())
    )
    assert said == (
        "the model runner has none of shared_read_done_event, war_fastpath_read_done_event, "
        "which the scheduler waits on"
    )


def test_a_pooled_index_that_sglang_does_not_fuse_stays_with_sglang(pair):
    """F10: SGLang's own backend of a model that pools its index, in releases that can.

    The pages of such a model have 64 tokens for each key of its index; here they have 64 in all.
    """
    from sglang_nsa_plugin.adapters import taken_over
    from sglang_nsa_plugin.harness.graph_backend import GraphBackend
    from sglang_nsa_plugin.state import STATE

    if not hasattr(pair.ours.backend, "dsa_index_kpool"):
        return  # an earlier release: there is no such model to serve
    pooled = GraphBackend(CPU, index_kpool=3, page_size=64)
    assert pooled.backend.dsa_index_kpool == 3
    assert taken_over.ATTRIBUTE not in vars(pooled.backend)
    assert STATE.reason.startswith("index k-pooling (3) is not supported without SGLang's fused")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"attention_backend": None, "decode_attention_backend": "dsa"}, None),
        ({"attention_backend": "fa3"}, "attention backend fa3 is not NSA/DSA sparse attention"),
        (
            {"speculative_algorithm": None},
            "no speculative decoding, so there are no speculative steps to plan",
        ),
    ],
)
def test_sglangs_resolved_arguments_are_asked(fields, reason):
    """From 0.5.19 on the arguments stay as the user gave them; SGLang's decisions lie beside them."""
    skip_unless_captured()
    from sglang_nsa_plugin.adapters import install
    from sglang_nsa_plugin.harness import process_stubs

    sparse = {"attention_backend": "dsa", "speculative_algorithm": "EAGLE"}
    published = process_stubs.publish_server_args(**{**sparse, **fields})
    as_a_child_gets_them = pickle.loads(pickle.dumps(published))
    assert install.why_idle(as_a_child_gets_them) == reason


def test_hip_stays_with_sglang(pair, monkeypatch):
    from sglang_nsa_plugin.adapters import supported

    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert (
        supported.why_draft_extend_unsupported(pair.ours.backend, model_runner())
        == "HIP is not supported"
    )


@pytest.mark.parametrize(
    ("names", "got"), [(("EXTEND", "DRAFT_EXTEND_V2"), "EXTEND, DRAFT_EXTEND_V2"), ((), "none")]
)
def test_draft_extend_must_be_one_forward_mode(pair, monkeypatch, names, got):
    """A batch's mode is compared with the one that was found at start-up."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_nsa_plugin.adapters import supported

    monkeypatch.setattr(ForwardMode, "is_draft_extend_v2", lambda mode: mode.name in names)
    said = supported.why_draft_extend_unsupported(pair.ours.backend, model_runner())
    assert said == f"one ForwardMode must be draft-extend, got {got}"


def test_a_backend_without_what_the_fill_reads_stays_with_sglang(pair, monkeypatch):
    from sglang_nsa_plugin.adapters import supported

    monkeypatch.delattr(pair.ours.backend, "dsa_index_topk")
    said = supported.why_draft_extend_unsupported(pair.ours.backend, model_runner())
    assert said == "DeepseekSparseAttnBackend has no attribute dsa_index_topk"
