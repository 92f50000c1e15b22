"""The in-graph adapter on SGLang's real backend object, on CPU tensors.

There are no CUDA graphs here: what a graph would hold is run again at each replay. SGLang's own code
fills a second backend over the same inputs, and every live value is compared.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import (
    BATCH_SIZES,
    DRAFT_TOKENS,
    expect_equal_after_sglang_fill,
    expect_prefills_impl_as_sglang_leaves_it,
    expect_sglang_to_take,
    functions_of_a_known_replay,
    make_pair,
    on_the_cpu,
    random_batch,
    step_and_expect_equal,
)

pytestmark = on_the_cpu


@pytest.fixture
def pair():
    return make_pair()


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
    pair = make_pair(backend, **harness)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        step_and_expect_equal(pair, random_batch(pair, generator))
    assert state.adapter == "in-graph"
    assert state.backend == {"auto": "cpu", "torch": "torch"}[backend]
    assert set(pair.fills().captured) == set(BATCH_SIZES)
    assert state.replays == 30
    assert not state.fallbacks


def test_equals_sglangs_cuda_kernel_in_tritons_interpreter(pair):
    """F1: on CUDA SGLang fills with one Triton kernel, which also clamps rows of padded requests."""
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured
    from sglang_nsa_plugin.harness.sglang_kernel import sglang_fused_fill

    generator = torch.Generator().manual_seed(2)
    result = Diff()
    for raw_bs in (1, 2, 3, 5):
        bs = random_batch(pair, generator, raw_bs)
        pair.replay(bs)
        theirs = pair.theirs.backend.decode_cuda_graph_metadata[bs]
        sglang_fused_fill(theirs, pair.inputs, bs, DRAFT_TOKENS, 2048, 64)
        compare_captured(pair.ours.backend.decode_cuda_graph_metadata[bs], theirs, result)
    assert result.first is None, result.first


def test_padded_rows_get_length_zero(pair):
    """F1, F3, F18: three requests in the bucket of four; the fourth has one token and four rows."""
    bs = random_batch(pair, torch.Generator().manual_seed(3), raw_bs=3)
    assert bs == 4
    step_and_expect_equal(pair, bs)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[bs]
    assert metadata.dsa_seqlens_expanded[-DRAFT_TOKENS:].tolist() == [0, 0, 0, 1]
    assert metadata.cache_seqlens_int32[-1] == 1


def test_draft_extend_lengths_include_the_draft_tokens(pair):
    """F4: unlike target-verify, draft-extend is handed lengths that count the new tokens already."""
    pair.inputs.seq_lens[:1].fill_(100)
    pair.replay(1)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[1]
    assert metadata.cache_seqlens_int32.tolist() == [100]
    assert metadata.dsa_seqlens_expanded.tolist() == [97, 98, 99, 100]


def test_accepted_tokens_do_not_change_the_metadata(pair, monkeypatch):
    """F13: every request has as many rows as draft tokens; accepted drafts matter after the forward.

    Capture and replay read one tensor of accepted tokens, as the runner's do.
    """
    shared = pair.ours._spec_info(pair.inputs.accept_lens)
    monkeypatch.setattr(pair.ours, "_spec_info", lambda accept_lens: shared)
    recapture(pair)
    bs = random_batch(pair, torch.Generator().manual_seed(4), raw_bs=4)
    for accepted in (1, 4):
        shared.num_accept_tokens.fill_(accepted)
        step_and_expect_equal(pair, bs)


def recapture(pair):
    """SGLang allocates its graph tensors anew and captures every batch size."""
    for one in (pair.ours, pair.theirs):
        one.init_state()
    for bs in BATCH_SIZES:
        pair.ours.capture_setup(bs)
        pair.theirs.capture_setup(bs)
        pair._replays[bs] = pair._capture(bs)


def test_metadata_object_and_addresses_never_change(pair):
    """F17: the captured forward reads by address."""
    generator = torch.Generator().manual_seed(5)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[2]
    tensors = {n: t for n, t in vars(metadata).items() if isinstance(t, torch.Tensor)}
    for _ in range(4):
        random_batch(pair, generator, raw_bs=2)
        pair.replay(2)
        assert pair.ours.backend.forward_metadata is metadata
        assert all(getattr(metadata, name) is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices"])
def test_replaced_inputs_go_through_sglang(pair, state, caplog, name):
    """F19: a graph that would read the captured tensors must not write over SGLang's values."""
    from sglang_nsa_plugin.adapters.fallbacks import FallbackReason

    replaced = FallbackReason.INPUTS_REPLACED.value
    generator = torch.Generator().manual_seed(6)
    bs = random_batch(pair, generator)
    for count in (1, 2):
        view = pair.ours.replay_view(bs)
        captured = getattr(pair.inputs, name)
        setattr(view, name, captured.clone())
        kept = captured.clone()
        captured.fill_(1)  # what the captured fill would read
        with pair.stub_process():
            pair.ours.backend.init_forward_metadata_out_graph(view)
        pair.replay_graph(bs)
        captured.copy_(kept)
        expect_equal_after_sglang_fill(pair, bs)
        assert state.fallbacks == {replaced: count}
    said = [r for r in caplog.records if replaced in r.getMessage()]
    assert len(said) == 1
    assert said[0].levelname == "WARNING"

    step_and_expect_equal(pair, bs)
    assert state.replays == 1


def test_inputs_whose_memory_moved_go_through_sglang(state):
    """F19: the tensor object is the captured one, the address that the graph reads is not.

    Only the shadow check looks: see test_no_release_moves_memory_under_the_inputs.
    """
    pair = make_pair(check_every=1_000)
    bs = random_batch(pair, torch.Generator().manual_seed(9))
    step_and_expect_equal(pair, bs)
    pair.inputs.seq_lens.data = pair.inputs.seq_lens.clone()
    pair.replay(bs)
    expect_equal_after_sglang_fill(pair, bs)
    assert sum(state.fallbacks.values()) == 1


INPUTS = {"seq_lens", "req_pool_indices", "req_to_token"}
MOVERS = {"set_", "resize_", "resize_as_", "resize_as_sparse_"}


def test_no_release_moves_memory_under_the_inputs():
    """F19: a replay knows the inputs by their objects, which SGLang may replace, but does not move."""
    import sglang

    sources = [path.read_text() for path in (Path(sglang.__file__).parent / "srt").rglob("*.py")]
    assert sum("req_to_token" in source for source in sources) > 10, "the search finds nothing any more"
    assert [said for source in sources for said in moves(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "self.buffers.seq_lens.data = other",
        "req_to_token.set_(other)",
        "pool.req_to_token.resize_(8, 9)",
        "seq_lens[:4].data = other",
        "buffers.req_pool_indices.data.set_(other)",
    ],
)
def test_a_release_that_moved_memory_would_be_found(source):
    assert list(moves(f"def f(self, pool, buffers, other):\n    {source}\n")) == [source]


def moves(source: str) -> Iterator[str]:
    """Statements that give an input other memory under the same object."""
    if not any(name in source for name in INPUTS):
        return
    for node in ast.walk(ast.parse(source)):
        targets = getattr(node, "targets", []) if isinstance(node, ast.Assign) else []
        moved = [t.value for t in targets if isinstance(t, ast.Attribute) and t.attr == "data"]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            moved += [node.func.value] if node.func.attr in MOVERS else []
        if any(named(tensor) in INPUTS for tensor in moved):
            yield ast.unparse(node)


def named(tensor: ast.expr) -> str:
    """The name of a tensor, of which a part or ``.data`` may be taken."""
    while isinstance(tensor, ast.Subscript) or (
        isinstance(tensor, ast.Attribute) and tensor.attr == "data"
    ):
        tensor = tensor.value
    return getattr(tensor, "attr", getattr(tensor, "id", ""))


def test_replaced_inputs_of_one_batch_size_are_news_to_the_others(pair, state):
    """Where one is left to SGLang the fill is switched off in every graph, and on again by the next."""
    generator = torch.Generator().manual_seed(12)
    for raw_bs in (1, 2):
        step_and_expect_equal(pair, random_batch(pair, generator, raw_bs))
    view = pair.ours.replay_view(1)
    view.seq_lens = view.seq_lens.clone()
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    assert sum(state.fallbacks.values()) == 1
    step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))
    step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=1))
    assert state.replays == 4


def test_a_view_of_the_captured_memory_is_accepted(pair, state):
    """F19: the runner captures slices and replays the whole buffers."""
    bs = random_batch(pair, torch.Generator().manual_seed(7), raw_bs=2)
    view = pair.ours.replay_view(bs)
    view.seq_lens, view.req_pool_indices = view.seq_lens[:bs], view.req_pool_indices[:]
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(view)
    assert state.replays == 1
    assert not state.fallbacks


@pytest.mark.parametrize(
    "change",
    [
        "another mode",
        "in capture",
        "seq_lens",
        "req_pool_indices",
        "req_to_token",
    ],
)
def test_a_known_batch_size_is_looked_at_all_the_same(pair, change):
    """What was admitted once is no reason to take over another call, or one with other tensors."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    expect_sglang_to_take(pair, change, ForwardMode.TARGET_VERIFY)


def test_a_known_batch_size_leaves_prefills_impl_as_sglang_would(pair):
    """A prefill on the same backend may have set ``use_mha``; SGLang's fill takes it back."""
    expect_prefills_impl_as_sglang_leaves_it(pair)


def test_a_replay_enters_one_function_of_ours(pair):
    """The CPU's caches hold nothing of a replay, so each function more costs a part of its host time."""
    assert functions_of_a_known_replay(pair) == ["_out_graph"]


@pytest.mark.parametrize("anew", [True, False], ids=["all anew", "one size anew"])
def test_recapture_forgets_the_old_tensors(pair, anew):
    """F19: behind it fills go to the new tensors and read the new inputs."""
    generator = torch.Generator().manual_seed(8)
    for raw_bs in (1, 2):
        step_and_expect_equal(pair, random_batch(pair, generator, raw_bs))
    old = pair.ours.backend.decode_cuda_graph_metadata[2]
    if anew:
        pair.ours.init_state()
        pair.ours.capture_setup(1)  # and not its fill: that size is SGLang's now
    else:
        del pair.ours.backend.decode_cuda_graph_metadata[2]  # else SGLang keeps it
    pair.ours.capture_setup(2)
    batch = pair.ours.capture_batch(2)
    pair.ours.backend.init_forward_metadata_in_graph(batch)
    new = pair.ours.backend.decode_cuda_graph_metadata[2]
    assert new is not old
    old.cache_seqlens_int32.fill_(-1)
    step_and_expect_equal(pair, random_batch(pair, generator, raw_bs=2))
    assert pair.ours.backend.forward_metadata is new
    if anew:
        assert old.cache_seqlens_int32.tolist() == [-1, -1]
        pair.ours.replay(random_batch(pair, generator, raw_bs=1))
        assert pair.ours.backend.forward_metadata is pair.ours.backend.decode_cuda_graph_metadata[1]


def test_other_modes_stay_with_sglang(pair):
    """Target-verify and decode on the same object must reach SGLang's code."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_nsa_plugin.adapters import in_graph, taken_over

    seen = []
    for mode in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.IDLE):
        batch = SimpleNamespace(forward_mode=mode, batch_size=2)
        original = lambda backend, batch, **kwargs: seen.append(batch.forward_mode)  # noqa: E731
        taken_over.record(original, pair.ours.backend, batch)
        in_graph._out_graph(original, pair.ours.backend, batch)
    assert len(seen) == 6


def test_a_batch_size_without_a_graph_stays_with_sglang(pair, state):
    """SGLang plans such a step eagerly; the adapter hooks nothing there; a stray call is SGLang's."""
    from sglang_nsa_plugin.adapters import in_graph

    assert not any(
        hook.target.endswith(".init_forward_metadata") for hook in in_graph.ADAPTER.common.hooks
    )
    view = pair.ours.replay_view(2)
    view.batch_size = BATCH_SIZES[-1] + 1
    seen = []
    original = lambda backend, batch, **kwargs: seen.append(batch.batch_size)  # noqa: E731
    in_graph._out_graph(original, pair.ours.backend, view)
    assert seen == [BATCH_SIZES[-1] + 1]
    assert state.replays == 0


def test_backends_not_made_by_the_draft_extend_factory_are_left_alone(pair):
    from sglang_nsa_plugin.adapters import taken_over

    assert getattr(pair.ours.backend, taken_over.ATTRIBUTE) is not None
    assert taken_over.ATTRIBUTE not in vars(pair.theirs.backend)


def test_server_info_carries_the_record(state):
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    from sglang_nsa_plugin import plugin

    def original(scheduler, asked):
        return GetInternalStateReqOutput(internal_state={"a": asked})

    output = plugin._get_internal_state(original, None, 1)
    record = output.internal_state["nsa_metadata"]
    assert output.internal_state["a"] == 1
    assert record["replays"] == 0
    assert record["fallbacks"] == {}


@pytest.mark.parametrize("is_written", [True, False])
def test_plans_that_sglang_left_unwritten_are_not_compared(pair, monkeypatch, is_written):
    """There is no plan on the CPU; from 0.5.21 on a GPU's may hold whatever the memory held."""
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured

    topk = pytest.importorskip("sglang.kernels.ops.attention.dsv4.topk")
    monkeypatch.setattr(topk, "topk_v2_plan_is_written", lambda lengths: is_written, raising=False)
    metadata = [one.backend.decode_cuda_graph_metadata[1] for one in (pair.ours, pair.theirs)]
    with_plans = [
        SimpleNamespace(**{**vars(one), "topk_v2_plan": torch.full((5, 2), count, dtype=torch.int32)})
        for count, one in enumerate(metadata)
    ]
    result = Diff()
    compare_captured(*with_plans, result)
    assert bool(result.different["topk_v2_plan"]) == is_written


def test_only_what_is_recorded_in_a_graph_counts_as_captured(state, monkeypatch):
    """A warm-up runs the same fill without recording it."""
    from sglang_nsa_plugin.adapters import captured_fill
    from sglang_nsa_plugin.state import record

    pair = make_pair()
    assert (record()["in_graph"], record()["captures"]) == (False, [])
    monkeypatch.setattr(captured_fill, "is_capturing", lambda: True)
    for bs in (4, 2):
        with pair.stub_process():
            pair.ours.backend.init_forward_metadata_in_graph(pair.ours.capture_batch(bs))
    assert (record()["in_graph"], record()["captures"]) == (True, [2, 4])
