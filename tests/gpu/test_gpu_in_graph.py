"""The in-graph adapter on SGLang's real backend object, in real CUDA graphs."""

from __future__ import annotations

from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

BATCH_SIZES = (1, 2, 4, 8, 16)
DRAFT_TOKENS = 4


def pair_for_installed(decode_impl: str, backend: str = "auto", **harness: object):
    pytest.importorskip("sglang", reason="needs SGLang with its GPU packages")
    from sglang_nsa_plugin.adapters import in_graph, supported
    from sglang_nsa_plugin.harness.graph_pair import GraphPair
    from sglang_nsa_plugin.harness.process_stubs import why_unavailable

    if not in_graph.is_generation():
        pytest.skip("this SGLang runs draft-extend eagerly: tests/gpu/test_gpu_eager.py")
    if harness.get("role") == "decode" and supported.why_no_decode_fence() is not None:
        pytest.skip("this SGLang frees req_to_token before a decode graph is replayed")

    missing = why_unavailable(decode_impl)
    if missing is not None:
        pytest.skip(f"needs SGLang's GPU packages: {missing}")
    harness = {"draft_tokens": DRAFT_TOKENS, "decode_impl": decode_impl, **harness}
    return GraphPair(torch.device("cuda", 0), BATCH_SIZES, backend, **harness)


def random_batch(pair, generator, longest=None):
    from sglang_nsa_plugin.harness.inputs import random_step

    raw_bs = int(torch.randint(1, BATCH_SIZES[-1] + 1, (), generator=generator))
    bs = pair.bucket(raw_bs)
    longest = longest or pair.inputs.req_to_token.shape[1]
    random_step(pair.inputs, generator, raw_bs, bs, pair.ours.draft_tokens, longest)
    return bs


@pytest.mark.parametrize("role", ["draft-extend", "draft-decode", "verify"])
@pytest.mark.parametrize("draft_tokens", [4, 6])
def test_every_value_of_a_pooled_index_equals_sglangs_fill(draft_tokens, role):
    """Its schedule and top-k plan, too, which the CPU does not have."""
    pytest.importorskip("sglang.srt.layers.attention.dsa.kpool_plan")
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.graph_backend import pooled

    pair = pair_for_installed(role=role, draft_tokens=draft_tokens, **pooled(4))
    state = pair.fills().role.state
    result, replays = Diff(), state.replays
    generator = torch.Generator().manual_seed(1)
    # SGLang looks up where the last draft token's key goes
    longest = pair.ours.longest - (draft_tokens if role == "verify" else 0)
    for _ in range(200):
        pair.step(random_batch(pair, generator, longest), result)
    assert result.first is None, result.first
    assert state.replays - replays == 200
    assert not state.fallbacks
    assert pair.metadata(1).page_table_1 is not None


@pytest.mark.parametrize("wide_tables", ["auto", "keep"])
@pytest.mark.parametrize(
    ("role", "draft_tokens"),
    [("draft-extend", 4), ("verify", 4), ("draft-decode", 4), ("draft-decode", 6), ("decode", 1)],
)
@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_every_value_equals_sglangs_fill(decode_impl, role, draft_tokens, wide_tables):
    from sglang_nsa_plugin.harness.diff import Diff, plan_is_written

    pair = pair_for_installed(decode_impl, role=role, draft_tokens=draft_tokens, wide_tables=wide_tables)
    state = pair.fills().role.state
    result, replays = Diff(), state.replays
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first
    assert state.backend == "cuda"
    assert state.replays - replays == 200
    assert not state.fallbacks
    assert result.compared["paged_mqa_schedule_metadata"] > 0
    most_rows = pair.metadata(BATCH_SIZES[-1]).dsa_seqlens_expanded
    assert (result.compared["topk_v2_plan"] > 0) == plan_is_written(most_rows)
    assert (result.compared["flashmla num_splits"] > 0) == (decode_impl == "flashmla_kv")
    # Without speculation SGLang itself leaves it out.
    is_wide = wide_tables == "keep" and role != "decode"
    assert (result.compared["page_table_1"] > 0) == is_wide


@pytest.mark.parametrize("wide_tables", ["auto", "keep"])
@pytest.mark.parametrize(
    ("role", "draft_tokens"), [("verify", 4), ("draft-decode", 4), ("draft-decode", 6), ("decode", 1)]
)
@pytest.mark.parametrize("decode_impl", ["flashmla_sparse", "flashmla_kv"])
def test_off_hands_every_step_to_sglang(decode_impl, role, draft_tokens, wide_tables, state):
    """With graphs that were captured with the fill, whatever SGLang's own way is then."""
    from sglang_nsa_plugin.adapters import install
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed(decode_impl, role=role, draft_tokens=draft_tokens, wide_tables=wide_tables)
    state, result = pair.fills().role.state, Diff()
    generator = torch.Generator().manual_seed(12)
    for on in (True, False, True, False):
        install.switch(role, on)
        for _ in range(30):
            bs = random_batch(pair, generator)
            if on:
                pair.step(bs, result)
            else:  # without poison, as SGLang does not write the 0 before running sums
                pair.replay(bs)
                pair.theirs.sglang_fill(bs)
                pair.compare(bs, result)
        assert result.first is None, (on, result.first)
    assert (state.replays, sum(state.fallbacks.values())) == (60, 60)


@pytest.mark.parametrize(
    ("role", "draft_tokens"), [("verify", 4), ("draft-decode", 4), ("draft-decode", 6), ("decode", 1)]
)
def test_a_replay_is_checked_before_the_next(role, draft_tokens, state):
    """SGLang's fill runs ahead of the graph, the comparison before the next one, on one stream."""
    pair = pair_for_installed("flashmla_kv", role=role, draft_tokens=draft_tokens, check_every=1)
    state = pair.fills().role.state
    checks = state.checks
    generator = torch.Generator().manual_seed(11)
    for _ in range(200):
        pair.replay(random_batch(pair, generator))
    torch.cuda.synchronize()
    assert not pair.fills().shadowed.check.failed(), state.first_mismatch
    assert state.checks - checks == 199
    pair.replay(1)
    pair.metadata(1).cache_seqlens_int32.fill_(-1)  # behind the graph, as a wrong fill would leave it
    pair.replay(1)
    torch.cuda.synchronize()
    assert pair.fills().shadowed.check.failed()


@pytest.mark.parametrize("role", ["verify", "draft-decode", "decode"])
@pytest.mark.parametrize(("decode_impl", "most"), [("flashmla_sparse", 2), ("flashmla_kv", 5)])
def test_nodes_of_a_plan_before_the_last(decode_impl, most, role):
    """As draft-extend's, without the event."""
    from sglang_nsa_plugin.cli.bench.timing import graph_nodes

    pair = pair_for_installed(decode_impl, role=role)
    batch = pair.ours.capture_batch(8)
    nodes = graph_nodes(lambda: pair.ours.backend.init_forward_metadata_in_graph(batch))
    assert sum(nodes.values()) <= most, nodes


def topk_options(topk_backend: str) -> dict[str, str]:
    """SGLang's options for it; since 0.5.20 the draft model has one of its own."""
    from sglang.srt.server_args import ServerArgs

    names = ("dsa_topk_backend", "speculative_dsa_topk_backend")
    return {name: topk_backend for name in names if hasattr(ServerArgs, name)}


@pytest.mark.parametrize(("topk_backend", "is_left_out"), [("sgl-kernel", True), ("flashinfer", False)])
def test_the_wide_table_is_left_out_where_nothing_reads_it(topk_backend, is_left_out):
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed("flashmla_sparse", **topk_options(topk_backend))
    backend, result = pair.ours.backend, Diff()
    assert (backend.decode_cuda_graph_metadata["page_table"] is None) == is_left_out
    assert pair.theirs.backend.decode_cuda_graph_metadata["page_table"] is not None
    assert backend.speculative_num_draft_tokens == DRAFT_TOKENS
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first
    assert (result.compared["page_table_1"] == 0) == is_left_out
    assert result.compared["real_page_table"] > 0


@pytest.mark.parametrize(("decode_impl", "most"), [("flashmla_sparse", 3), ("flashmla_kv", 6)])
def test_nodes_of_the_recorded_refresh(decode_impl, most):
    """The fill, the event behind it and SGLang's top-k plan; FlashMLA's own tables where it decodes."""
    from sglang_nsa_plugin.cli.bench.timing import graph_nodes
    from sglang_nsa_plugin.state import STATE

    pair = pair_for_installed(decode_impl)
    batch = pair.ours.capture_batch(8)
    nodes = graph_nodes(lambda: pair.ours.backend.init_forward_metadata_in_graph(batch))
    assert STATE.mqa_schedule == "cuda"
    assert sum(nodes.values()) <= most, nodes


def test_a_schedule_unlike_deep_gemms_stays_with_deep_gemm(monkeypatch):
    from sglang_nsa_plugin.adapters import mqa_schedule
    from sglang_nsa_plugin.harness.diff import Diff

    right = mqa_schedule._of_fill
    monkeypatch.setattr(mqa_schedule, "_of_fill", lambda *arguments: right(*arguments) + 1)
    pair = pair_for_installed("flashmla_sparse")
    assert pair.fills().remainder_last is None
    result = Diff()
    pair.step(random_batch(pair, torch.Generator().manual_seed(8)), result)
    assert result.first is None, result.first
    assert result.compared["paged_mqa_schedule_metadata"] > 0


def test_long_contexts_reach_the_top_k_plan():
    """Lengths over 65,536 put items into the plan, which short ones leave empty."""
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed("flashmla_sparse", context_len=163_840, pool_size=17)
    result = Diff()
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first
    assert result.compared["topk_v2_plan"] > 10 * 2


def test_metadata_addresses_never_change():
    pair = pair_for_installed("flashmla_sparse")
    generator = torch.Generator().manual_seed(3)
    metadata = pair.ours.backend.decode_cuda_graph_metadata[4]
    names = [name for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)]
    before = {name: getattr(metadata, name).data_ptr() for name in names}
    for _ in range(5):
        random_batch(pair, generator)
        pair.replay(4)
        assert pair.ours.backend.forward_metadata is metadata
    assert {name: getattr(metadata, name).data_ptr() for name in names} == before


def test_replaced_inputs_go_through_sglang_and_are_not_overwritten():
    """The graph still holds a fill of the captured tensors: it must not run over SGLang's values."""
    from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured
    from sglang_nsa_plugin.state import STATE

    inputs_replaced = FallbackReason.INPUTS_REPLACED.value
    pair = pair_for_installed("flashmla_sparse")
    generator = torch.Generator().manual_seed(4)
    bs = random_batch(pair, generator)
    captured = pair.inputs.seq_lens.clone()
    replaced = pair.ours.replay_view(bs)
    replaced.seq_lens = captured.clone()
    pair.inputs.seq_lens.fill_(777)  # what the captured fill would read
    fallbacks = STATE.fallbacks[inputs_replaced]
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(replaced)
    pair.replay_graph(bs)
    assert STATE.fallbacks[inputs_replaced] == fallbacks + 1
    pair.inputs.seq_lens.copy_(captured)
    pair.theirs.sglang_fill(bs)
    result = Diff()
    compare_captured(
        pair.ours.backend.decode_cuda_graph_metadata[bs],
        pair.theirs.backend.decode_cuda_graph_metadata[bs],
        result,
    )
    assert result.first is None, result.first

    pair.step(bs, result)  # and the next replay with the captured tensors is ours again
    assert result.first is None, result.first
    assert STATE.fallbacks[inputs_replaced] == fallbacks + 1


def test_a_step_whose_fill_failed_and_all_after_it_are_sglangs(state, monkeypatch):
    """The graphs still hold fills of the captured tensors, which are switched off on the device."""
    from sglang_nsa_plugin.adapters.captured_fill import GraphFill
    from sglang_nsa_plugin.adapters.outcome import OUTCOME
    from sglang_nsa_plugin.harness.diff import Diff

    pair = pair_for_installed("flashmla_sparse")
    generator = torch.Generator().manual_seed(6)

    def fails(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(GraphFill, "reads", fails)
    for _ in range(6):
        bs = random_batch(pair, generator)
        kept = pair.inputs.seq_lens.clone()
        with pair.stub_process():
            pair.ours.backend.init_forward_metadata_out_graph(pair.ours.replay_view(bs))
        pair.inputs.seq_lens.fill_(777)  # what a fill that still ran would read
        pair.replay_graph(bs)
        pair.inputs.seq_lens.copy_(kept)
        pair.theirs.sglang_fill(bs)
        result = Diff()
        pair.compare(bs, result)
        assert result.first is None, result.first
    assert OUTCOME.has_failed
    assert state.replays == 0


@pytest.mark.parametrize("fault", ["in a capture", "in the last batch size"])
def test_an_error_while_the_fill_is_set_up_leaves_every_graph_to_sglang(fault, monkeypatch):
    """Also graphs that hold our fill; and a capture that it broke leaves nothing behind."""
    from sglang_nsa_plugin.adapters import captured_fill
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured
    from sglang_nsa_plugin.state import STATE

    refresh_derived = captured_fill.BackendFills.refresh_derived

    def failing(fill, metadata):
        if fault == "in a capture" and captured_fill.is_capturing():
            torch.cuda.synchronize()  # not allowed there
        if fault != "in a capture" and metadata.cache_seqlens_int32.shape[0] == BATCH_SIZES[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        refresh_derived(fill, metadata)

    monkeypatch.setattr(captured_fill.BackendFills, "refresh_derived", failing)
    stream = torch.cuda.current_stream()
    pair = pair_for_installed("flashmla_sparse")
    assert torch.cuda.current_stream() == stream
    assert STATE.adapter is None
    assert STATE.reason.startswith("the fill could not be set up: ")

    generator, result = torch.Generator().manual_seed(7), Diff()
    for _ in range(20):
        bs = random_batch(pair, generator)
        pair.ours.replay(bs)
        kept = pair.inputs.seq_lens.clone()
        pair.inputs.seq_lens.fill_(777)  # what a fill that still ran would read
        pair.replay_graph(bs)
        pair.inputs.seq_lens.copy_(kept)
        pair.theirs.sglang_fill(bs)
        compare_captured(
            *(r.backend.decode_cuda_graph_metadata[bs] for r in (pair.ours, pair.theirs)), result
        )
    assert result.first is None, result.first


@pytest.mark.unsanitized("the profiler and the tool cannot both be attached")
def test_replay_launches_nothing_and_synchronises_nothing():
    pair = pair_for_installed("flashmla_sparse")
    generator = torch.Generator().manual_seed(5)
    bs = random_batch(pair, generator)
    call = pair.before_replay(bs)
    with pair.stub_process():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    launches = [
        event.name for event in profile.events() if "Launch" in event.name or "Memcpy" in event.name
    ]
    assert launches == []


@pytest.mark.parametrize("event", ["in_graph", "before_replay"])
@pytest.mark.unsanitized("the tool waits for the kernels that it watches")
def test_fence_covers_the_read(event):
    """The scheduler overwrites req_to_token behind the published event while the graph runs.

    The graph waits, fills, records the event and goes on for long. Behind the event recorded in the
    graph the tables hold the old slots, and the overwrite ends before the graph does: the overlap is
    kept. Behind SGLang's event, recorded before the replay, they do not: the test would notice.
    """
    pair = pair_for_installed("flashmla_sparse")
    batch, bs = pair.ours.capture_batch(8), 8
    backend = pair.ours.backend
    random_batch(pair, torch.Generator().manual_seed(6))
    pair.inputs.seq_lens.fill_(4_000)
    pair.inputs.req_pool_indices.copy_(torch.arange(1, pair.inputs.max_bs + 1))
    pages = pair.inputs.req_to_token[1 : bs + 1, :4_000:64] // 64
    expected = pages.repeat_interleave(DRAFT_TOKENS, 0)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cuda._sleep(100_000_000)
        backend.init_forward_metadata_in_graph(batch)
        torch.cuda._sleep(1_000_000_000)
    read_done = pair.captured(bs).read_done
    forward, scheduler = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(forward):
        if event == "before_replay":
            read_done = torch.cuda.Event()
            read_done.record()
        graph.replay()
        forward_done = torch.cuda.Event()
        forward_done.record()
    with torch.cuda.stream(scheduler):
        scheduler.wait_event(read_done)
        pair.inputs.req_to_token.fill_(-5)
        overwritten = torch.cuda.Event()
        overwritten.record()
    overwritten.synchronize()
    overlapped = not forward_done.query()
    torch.cuda.synchronize()

    table = backend.decode_cuda_graph_metadata[bs].real_page_table[:, : pages.shape[1]]
    assert overlapped
    assert torch.equal(table, expected) == (event == "in_graph")


def test_an_empty_kernel_comes_before_verifys_replay_while_the_gpu_is_busy(state, monkeypatch):
    """The event is recorded in a graph, as draft-extend's is."""
    from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND
    from sglang_nsa_plugin.cli.bench.timing import graph_nodes

    pair = pair_for_installed("flashmla_sparse", role="verify")
    before_replay = pair.before_replay(8)
    event, graph = torch.cuda.Event(external=True), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cuda._sleep(200_000_000)
        event.record()
    monkeypatch.setattr(LAST_DRAFT_EXTEND, "fill_done", event)
    launched = mock.Mock()
    monkeypatch.setattr(pair.fills().no_op, "_launch", launched)
    with pair.stub_process():
        for _ in range(2):
            graph.replay()
            before_replay()
            assert launched.call_count == 1
            torch.cuda.synchronize()
            before_replay()
            assert launched.call_count == 1
            launched.reset_mock()
    monkeypatch.undo()
    assert sum(graph_nodes(pair.fills().no_op.launch_if_busy).values()) == 1


def test_there_is_none_before_the_draft_models_graphs(state):
    assert pair_for_installed("flashmla_sparse", role="draft-extend").fills().no_op is None


def test_the_empty_kernel_runs_on_the_current_stream_and_in_a_graph():
    """On another stream, and after one that is busy."""
    from sglang_nsa_plugin.kernels import cuda

    launch = cuda.bind_no_op(torch.device("cuda", 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        busy = torch.cuda.Event()
        launch()
        graph.replay()
        busy.record()
        assert not busy.query()  # it waits for what comes before it
        busy.synchronize()
    torch.cuda.synchronize()
