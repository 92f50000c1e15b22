"""The wide page table, which the graphs of a step do without where nothing reads it.

SGLang itself decides when: it leaves the table out of decode graphs whose top-k reads the paged one. The
adapter only lets it ask the same of a speculative step's graphs.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    draft_tokens_as_sglang_decides,
    expect_equal_after_sglang_fill,
    make_pair,
    on_the_cpu,
    random_batch,
)

from sglang_nsa_plugin.adapters import draft_decode, taken_over, verdict, wide_tables
from sglang_nsa_plugin.adapters.adapter import Request, Takeover
from sglang_nsa_plugin.state import ROLES, STATES

pytestmark = on_the_cpu

FIELD, GETTER = "page_table_1", "get_page_table_1"
# Who reads the table, and why a draft-extend graph without it does not come by.
READERS = {
    "DSAIndexerMetadata.get_page_table_1": "called by the indexer's HIP path alone, see below",
    "IndexerKPool._kpool_fused_topk_mapping": "k-pooling, for which SGLang keeps the table",
    "DSAMetadataManagementMixin._copy_base_replay_buffers": "draft-decode by SGLang with the table",
    "DSATopKBackend.topk_transform": "not in its v2 branch, which SGLang's condition asks for",
    "DeepseekSparseAttnBackend._apply_cuda_graph_metadata": "SGLang's own fill; it takes None",
    "DeepseekSparseAttnBackend._graph_page_table_width": "asks whether it is there",
    "DeepseekSparseAttnBackend._forward_trtllm": "with unfused top-k alone",
    "DeepseekSparseAttnBackend.forward_decode": "with unfused top-k alone",
    "DeepseekSparseAttnBackend.forward_extend": "with unfused top-k alone",
    "DeepseekSparseAttnBackend.init_forward_metadata_replay_cuda_graph_from_precomputed": "draft-decode",
    "DeepseekSparseAttnBackend.prepare_mtp_seed_indices": "ragged prefill, planned eagerly",
    "DeepseekSparseAttnBackendMTPPrecomputeMixin._precompute_decode_mode": "draft-decode",
    "DeepseekSparseAttnBackendMTPPrecomputeMixin._precompute_target_verify_mode": "target-verify",
    "DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph": "draft-decode",
}
CALLERS = {
    "Indexer._get_topk_paged": "on HIP alone",
    "Indexer._get_topk_ragged": "on HIP alone",
}


def test_every_reader_of_the_wide_table_is_known() -> None:
    """A new one has to be looked at: does it run on draft-extend where SGLang left the table out?"""
    readers, callers = set(), set()
    for path in attention_sources():
        tree = ast.parse(path.read_text())
        readers |= set(functions_with(tree, FIELD))
        callers |= set(functions_with(tree, GETTER))
    assert readers - set(READERS) == set()
    assert callers - set(CALLERS) == set()
    assert "DSATopKBackend.topk_transform" in readers, "the search finds nothing any more"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("wide_tables", ["auto", "keep"])
def test_sglang_decides_as_if_there_were_no_speculation(role, wide_tables, state) -> None:
    pair = make_pair(role=role, wide_tables=wide_tables)
    expected = None if wide_tables == "auto" else pair.ours.draft_tokens
    assert draft_tokens_as_sglang_decides(pair) == [expected] * len(pair.ours.steps())
    assert pair.fills().captured == {}


@pytest.mark.parametrize("role", ROLES)
def test_without_the_plugin_sglang_sees_speculation(role, state) -> None:
    pair = make_pair(role=role)
    taken_over.hand_back(pair.ours.backend)
    expected = [pair.ours.draft_tokens] * len(pair.ours.steps())
    assert draft_tokens_as_sglang_decides(pair) == expected


def test_draft_decode_keeps_it_where_another_plugin_replaced_the_hook(state, monkeypatch) -> None:
    """SGLang's own fill of all draft steps raises where there is none."""
    pair = make_pair(role="draft-decode")
    multi_step, name = type(pair.ours.backend), "init_forward_metadata_out_graph"
    monkeypatch.setattr(multi_step, name, inspect.unwrap(getattr(multi_step, name)))
    expected = [pair.ours.draft_tokens] * len(pair.ours.steps())
    assert draft_tokens_as_sglang_decides(pair) == expected


@pytest.mark.parametrize("draft_tokens", [4, 6])
def test_draft_decode_gets_it_back_where_another_plugin_replaced_the_hook_later(
    draft_tokens, state, monkeypatch, caplog
) -> None:
    """After the capture, before the verdict: from then on SGLang's own fill of all steps runs."""
    pair = make_pair(role="draft-decode", draft_tokens=draft_tokens)
    without_wide_table(pair)
    multi_step, name = type(pair.ours.backend), "init_forward_metadata_out_graph"
    monkeypatch.setattr(multi_step, name, inspect.unwrap(getattr(multi_step, name)))
    caplog.set_level(logging.INFO)
    verdict.conclude(SimpleNamespace(), SimpleNamespace(), {"draft-decode": Request("auto", 0)})
    assert f"another plugin replaced {multi_step.__module__}.{multi_step.__name__}.{name}" in caplog.text
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        bs = random_batch(pair, generator)
        pair.metadata(bs).page_table_1.fill_(-1)
        pair.ours.replay(bs)
        expect_equal_after_sglang_fill(pair, bs)
    assert STATES["draft-decode"].replays == 0


def test_no_memory_for_the_table_ends_the_start_in_words(state, monkeypatch) -> None:
    pair = make_pair(role="draft-decode")
    without_wide_table(pair)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(RuntimeError, match="Start with --nsa-metadata-wide-tables keep"):
        wide_tables.restore(pair.ours.steps()[0])


@pytest.mark.parametrize("is_shared", [True, False])
def test_draft_steps_without_the_table_are_planned_once_for_each_set(
    is_shared, state, monkeypatch
) -> None:
    """They share one, unless another plugin replaced the hook by which they come to do so. SGLang's fill
    without the table needs a GPU.
    """
    if not is_shared:
        monkeypatch.setattr(draft_decode, "share_metadata", lambda backend: None)
    planned = []
    monkeypatch.setattr(draft_decode, "_plan_one_step", lambda step, batch: planned.append(step))
    pair = make_pair(role="draft-decode")
    without_wide_table(pair)
    taken_over.hand_back(pair.ours.backend)
    pair.ours.replay(2)
    steps = pair.ours.steps()
    assert planned == (steps[:1] if is_shared else steps)
    assert all(a.forward_metadata is b for a, b in zip(steps, pair.ours.metadata(2), strict=True))
    assert len({id(step.forward_metadata) for step in steps}) == (1 if is_shared else len(steps)) < 3


def without_wide_table(pair) -> None:
    """As SGLang leaves it out on a GPU."""
    for bs in pair.batch_sizes:
        for metadata in pair.ours.metadata(bs):
            object.__setattr__(metadata, FIELD, None)
    for step in pair.ours.steps():
        step.decode_cuda_graph_metadata["page_table"] = None


@pytest.mark.parametrize("role", ["draft-extend", "verify"])
@pytest.mark.parametrize("was_left_out", [True, False])
def test_what_was_left_out_stays_out_of_all_later_graphs(role, was_left_out, state) -> None:
    """SGLang fills them then. Its memory may have gone to the KV cache."""
    pair = make_pair(role=role)
    if was_left_out:
        without_wide_table(pair)
    taken_over.hand_back(pair.ours.backend)
    for _ in range(2):  # captures
        expected = None if was_left_out else pair.ours.draft_tokens
        assert draft_tokens_as_sglang_decides(pair) == [expected] * len(pair.ours.steps())
        if was_left_out:
            pair.ours.backend.decode_cuda_graph_metadata["page_table"] = None


@pytest.mark.parametrize("role", ROLES)
def test_what_is_saved_is_counted(role, state, monkeypatch) -> None:
    """Here SGLang drops no table, so only draft-decode's second set is saved, which is shared."""
    monkeypatch.setattr(wide_tables, "is_dropped", lambda backend: True)
    pair = make_pair(role=role)
    rows = pair.ours.max_bs * (1 if role == "draft-decode" else pair.ours.draft_tokens)
    expected = rows * pair.inputs.req_to_token.shape[1] * 4 * len(pair.ours.steps())
    assert STATES[role].bytes_saved == expected
    pair.ours.init_state()  # SGLang allocates anew
    assert STATES[role].bytes_saved == expected


def test_savings_are_reported_in_memory_tokens_and_a_flag(state, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 140_000_000_000))
    caplog.set_level(logging.INFO)
    draft = SimpleNamespace(size=1_000, get_kv_size_bytes=lambda: 1_000_000)
    target = SimpleNamespace(size=1_000, get_kv_size_bytes=lambda: 61_000_000)
    runner = SimpleNamespace(token_to_kv_pool=target)
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    takeover = Takeover(lambda backend: None)
    state.in_place, state.bytes_saved = True, 1_400_000_000

    class Owner(SimpleNamespace):
        __hash__ = object.__hash__

    table = torch.zeros(1_000, 4_000, dtype=torch.int32)
    of_a_batch_size = torch.zeros(500, 8_000, dtype=torch.int32)
    captured = SimpleNamespace(page_table_1=table[:7], real_page_table=of_a_batch_size)
    held = {"page_table": table, "real_page_table": None, 7: captured}
    owner = Owner(token_to_kv_pool=draft, decode_cuda_graph_metadata=held)
    takeover.add(owner)
    wide_tables.report_savings(scheduler, [takeover])
    assert (
        "page tables of the graphs take 32 MB instead of 1432 MB, because nothing reads the others. "
        "That is 22580 tokens of KV cache, if you raise --mem-fraction-static by 0.0100" in caplog.text
    )


def test_an_error_leaves_the_backend_as_it_was() -> None:
    pair = make_pair()
    backend = pair.ours.backend
    tokens = backend.speculative_num_draft_tokens
    with pytest.raises(TypeError), pair.stub_process():
        backend.init_cuda_graph_state(None, None)
    assert backend.speculative_num_draft_tokens == tokens


def attention_sources() -> Iterator[Path]:
    import sglang

    root = Path(sglang.__file__).parent / "srt" / "layers" / "attention"
    return (path for path in root.rglob("*.py") if "dsa" in path.as_posix())


def functions_with(tree: ast.AST, attribute: str, within: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the functions that read this attribute of something."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        inside = (*within, node.name) if named else within
        is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if is_read and node.attr == attribute:
            yield ".".join(inside)
        yield from functions_with(node, attribute, inside)
