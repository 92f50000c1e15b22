"""The implementations on a GPU: graphs, streams, synchronisation, memory, compiles, size.

What they write is tested by ``test_values.py`` and ``test_fuzz.py``, on a GPU too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import POISON, Backend, Case, Guarded, Layout

from sglang_nsa_plugin import (
    bind,
    fill_draft_extend_metadata_cuda,
    fill_draft_extend_metadata_cuda_adaptive,
)
from sglang_nsa_plugin.cli.bench import timing
from sglang_nsa_plugin.kernels import cuda

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
UNIFORM = Case(
    seq_lens=[64, 1, 40, 0, 100],
    extend_lens=4,
    pool=9,
    tokens=130,
    index_topk=50,
    page_size=16,
    ctx_dims=2,
    enabled=1,
    width=128,
    pages=8,
)
CALLS = 6  # more than the plain launches of a bound fill, after which it is a graph
RAGGED = replace(UNIFORM, extend_lens=[4, 0, 2, 3, 1], rows=20, row_count=True)


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(GPU, request.param)


@contextlib.contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(bound: Callable[[], None]) -> torch.cuda.CUDAGraph:
    bound()  # compiles and loads what it needs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
    return graph


# CUDA graphs


@pytest.mark.parametrize("case", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_replays_follow_the_inputs(backend: Backend, case: Case) -> None:
    guarded = Guarded(case, GPU)
    args = guarded.args
    graph = capture(backend.bind(args))
    tensors = args.inputs() | args.outputs()
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def replay(_: object) -> None:
        graph.replay()
        torch.cuda.synchronize()

    rounds = [
        ([64, 1, 40, 0, 100], [4, 0, 2, 3, 1], [0, 1, 2, 3, 4], 1),
        ([100_001, 64, 3, 128, 7], [1, 6, 0, 2, 9], [8, 7, 8, 7, 0], 1),
        ([5, 6, 7, 8, 9], [9, 9, 9, 9, 9], [1, 1, 1, 1, 1], 0),
        ([1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], 1),
        ([-5, 2**31 - 1, 129, 2**40, 128], [-3, 2**31 - 1, 1, 1, 1], [9, -1, 3, 2**40, 2], 1),
        ([64, 1, 40, 0, 100], [4, 0, 2, 3, 1], [0, 1, 2, 3, 4], 1),
    ]
    for lengths, extend_lens, indices, enabled in rounds:
        args.seq_lens.copy_(torch.tensor(lengths))
        if isinstance(args.extend_lens, torch.Tensor):
            args.extend_lens.copy_(torch.tensor(extend_lens))
        args.req_pool_indices.copy_(torch.tensor(indices))
        args.req_to_token.add_(1)
        args.enabled.fill_(enabled)
        guarded.poison()
        guarded.check(replay)
    assert pointers == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_capture_runs_nothing(backend: Backend) -> None:
    guarded = Guarded(UNIFORM, GPU)
    bound = backend.bind(guarded.args)
    bound()
    torch.cuda.synchronize()
    guarded.poison()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
    torch.cuda.synchronize()
    for name, tensor in guarded.args.outputs().items():
        assert (tensor == POISON).all(), name


def test_several_graphs_share_their_inputs(backend: Backend) -> None:
    """One graph for each batch size, as SGLang captures them, over views of the same inputs."""
    largest = Guarded(UNIFORM, GPU)
    graphs = []
    for bs in (1, 2, 5):
        guarded = Guarded(replace(UNIFORM, seq_lens=UNIFORM.seq_lens[:bs]), GPU)
        inputs = {
            "seq_lens": largest.args.seq_lens[:bs],
            "req_pool_indices": largest.args.req_pool_indices[:bs],
            "req_to_token": largest.args.req_to_token,
        }
        guarded.args = replace(guarded.args, **inputs)
        graphs.append((guarded, capture(backend.bind(guarded.args))))
    for lengths in ([3, 50, 99, 1, 0], [128, 1, 1, 64, 65]):
        largest.args.seq_lens.copy_(torch.tensor(lengths))
        for guarded, graph in graphs:
            guarded.poison()
            guarded.check(lambda _, graph=graph: (graph.replay(), torch.cuda.synchronize()))


# A bound fill that is called again and again becomes a CUDA graph of its own


def repeated(case: Case) -> tuple[Guarded, Callable[[], None]]:
    """A bound fill that has been called often enough to be a graph."""
    guarded = Guarded(case, GPU)
    bound = Backend(GPU, "cuda").bind(guarded.args)
    for _ in range(CALLS):
        bound()
    torch.cuda.synchronize()
    guarded.poison()
    return guarded, bound


@pytest.mark.parametrize("case", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_a_repeated_call_follows_its_inputs(case: Case) -> None:
    guarded, bound = repeated(case)
    for lengths in ([3, 50, 99, 1, 0], [128, 1, 1, 64, 65]):
        guarded.args.seq_lens.copy_(torch.tensor(lengths))
        guarded.poison()
        guarded.check(lambda _: (bound(), torch.cuda.synchronize()))


@pytest.mark.unsanitized("the profiler and the tool cannot both be attached")
def test_a_repeated_call_launches_one_graph() -> None:
    _, bound = repeated(UNIFORM)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        bound()
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if "Launch" in event.name]
    assert launches == ["cudaGraphLaunch"]


def test_a_repeated_call_is_captured_as_a_kernel() -> None:
    guarded, bound = repeated(UNIFORM)
    assert timing.graph_nodes(bound) == {"kernel": 1}
    graph = capture(bound)
    guarded.poison()
    guarded.check(lambda _: (graph.replay(), torch.cuda.synchronize()))


def test_threads_may_call_one_bound_fill_while_its_graph_is_made() -> None:
    """That they never launch the graph at once is tested by tests/test_graph_launch.py."""
    guarded = Guarded(UNIFORM, GPU)
    bound = Backend(GPU, "cuda").bind(guarded.args)
    start = threading.Barrier(4)

    def call() -> None:
        start.wait()  # the first calls of all threads: plain ones, the one that makes the graph, replays
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                bound()

    def call_from_threads(_: object) -> None:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(call) for _ in range(4)]:
                done.result()
        torch.cuda.synchronize()

    guarded.check(call_from_threads)


def test_the_graph_of_a_call_is_made_while_another_stream_is_captured() -> None:
    guarded = Guarded(UNIFORM, GPU)
    bound = Backend(GPU, "cuda").bind(guarded.args)
    elsewhere, numbers = torch.cuda.Stream(), torch.zeros(8, device=GPU)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()

    def call_in_a_capture(_: object) -> None:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            numbers.add_(1)
            with torch.cuda.stream(elsewhere):
                for _ in range(CALLS):
                    bound()
        torch.cuda.synchronize()

    guarded.check(call_in_a_capture)
    graph.replay()
    assert numbers.tolist() == [1] * 8


# The host


@pytest.mark.parametrize("case", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_a_bound_fill_never_synchronises(backend: Backend, case: Case) -> None:
    guarded = Guarded(case, GPU)
    bound = backend.bind(guarded.args)
    guarded.check(lambda _: bound())
    guarded.poison()
    expected = guarded.expected()
    with synchronising_is_an_error():
        bound()
    guarded.compare(expected)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_bound_fill_allocates_nothing(name: str) -> None:
    guarded = Guarded(RAGGED, GPU)
    bound = Backend(GPU, name).bind(guarded.args)
    bound()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(GPU)["allocation.all.allocated"]
    for _ in range(10):
        bound()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats(GPU)["allocation.all.allocated"] == before


@pytest.mark.parametrize("calls", [1, CALLS])
@pytest.mark.parametrize("bound_on", ["default stream", "another stream"])
@pytest.mark.unsanitized("the tool waits for the kernels that it watches")
def test_a_fill_runs_on_the_stream_that_is_current(backend: Backend, bound_on: str, calls: int) -> None:
    """When it is called, not when it was bound: it waits for a slow producer on that stream."""
    guarded = Guarded(UNIFORM, GPU)
    args = guarded.args
    other = torch.cuda.Stream() if bound_on == "another stream" else torch.cuda.current_stream()
    with torch.cuda.stream(other):
        bound = backend.bind(args)
        for _ in range(calls):
            bound()
    torch.cuda.synchronize()
    new = torch.tensor([7, 128, 33, 90, 2], device=GPU)
    args.seq_lens.copy_(new)
    guarded.poison()
    expected = guarded.expected()
    args.seq_lens.zero_()
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # 0.2 s
        args.seq_lens.copy_(new)
        bound()
    returned_early = not stream.query()
    stream.synchronize()
    guarded.compare(expected)
    assert returned_early


def test_tensors_on_another_device_than_the_current(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    guarded = Guarded(UNIFORM, other)
    bound = backend.bind(guarded.args)
    guarded.check(lambda _: (bound(), torch.cuda.synchronize(other)))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["auto", "cuda", "triton", "torch"])
def test_bind_by_name(name: str) -> None:
    guarded = Guarded(RAGGED, GPU)
    bound = bind(guarded.args, name)
    assert bound.backend == ("cuda" if name == "auto" else name)
    guarded.check(lambda _: bound())


# Size


def test_full_size(backend: Backend) -> None:
    """64 requests at a context length of 163,840, all columns live or nearly so."""
    width = 163_904
    lengths = [width - 3 * r for r in range(60)] + [0, 1, width + 1, 2**31 - 1]
    case = Case(
        seq_lens=lengths,
        indices=list(reversed(range(64))),
        extend_lens=4,
        pool=64,
        tokens=width + 4,
        index_topk=2048,
        page_size=64,
        ctx_dims=2,
        width=width,
        pages=width // 64,
        dtypes={"req_to_token": torch.int32},
        layouts={"page_table_1": Layout(gap=0), "req_to_token": Layout(gap=0)},
    )
    guarded = backend.check(case)
    # the same at addresses where nothing can be copied as vectors
    del guarded
    odd = dict.fromkeys(("page_table_1", "req_to_token"), Layout(gap=1, offset=3))
    backend.check(replace(case, layouts=odd))


@pytest.mark.parametrize("odd", [False, True], ids=["vectors", "cells"])
@pytest.mark.parametrize("requests", [3, 20, 70, 300])
def test_long_tables_of_many_requests(requests: int, odd: bool) -> None:
    """One block for each small chunk of tokens, for each large one, or for several large ones."""
    lengths = [(977 * r) % 41_000 if r % 3 else 0 for r in range(requests)]
    case = Case(
        seq_lens=lengths,
        extend_lens=2,
        indices=[r % 5 for r in range(requests)],
        tokens=41_000,
        width=40_960,
        pages=641,
        page_size=64,
        dtypes={"req_to_token": torch.int32},
        layouts=dict.fromkeys(
            ("page_table_1", "req_to_token"), Layout(gap=1, offset=3) if odd else Layout(gap=0)
        ),
    )
    Backend(GPU, "cuda").check(case)


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 7])
def test_any_number_of_blocks_writes_the_same(max_blocks: int) -> None:
    lengths = [(977 * r) % 3000 for r in range(300)]
    extend_lens = [(r * r) % 5 for r in range(300)]
    case = replace(
        RAGGED,
        seq_lens=lengths,
        extend_lens=extend_lens,
        rows=sum(extend_lens) + 300,
        tokens=3000,
        width=2900,
        pages=180,
        dtypes={"req_to_token": torch.int32},
    )
    guarded = Guarded(case, GPU)
    guarded.check(lambda args: cuda.bind(args, max_blocks=max_blocks)())


# Triton's compiles


def compiled_variants() -> int:
    from sglang_nsa_plugin.kernels.triton import _fill_kernel

    return len(_fill_kernel.device_caches[GPU.index][0])


def test_triton_compiles_nothing_new_for_other_sizes() -> None:
    backend = Backend(GPU, "triton")
    backend.check(UNIFORM)
    before = compiled_variants()
    assert before > 0
    names = (*UNIFORM.input_values(), *UNIFORM.output_shapes())
    layouts = [Layout(gap=0), Layout(step=2, offset=1), Layout(step=16, gap=3), Layout(offset=4)]
    for i, bs in enumerate((0, 1, 2, 3, 8, 16, 17, 64, 300)):
        lengths = [(31 * r) % 140 for r in range(bs)]
        for width in (1, 2, 16, 40, 193, 1024):
            case = replace(
                UNIFORM,
                seq_lens=lengths,
                extend_lens=i % 7,
                pool=1 + 5 * i,
                tokens=width + 3,
                index_topk=(1, 16, 50, 2048)[i % 4],
                page_size=(2, 3, 16, 64)[i % 4],
                width=width,
                pages=width // 2 + 1,
                layouts=dict.fromkeys(names, layouts[(i + width) % 4]),
            )
            backend.check(case)
    assert compiled_variants() == before


# fill_draft_extend_metadata_cuda


def without_adapting(*args: object) -> torch.Tensor:
    return fill_draft_extend_metadata_cuda(*args, use_adaptive=False)


@pytest.mark.parametrize(
    "function",
    [
        fill_draft_extend_metadata_cuda,
        fill_draft_extend_metadata_cuda_adaptive,
        without_adapting,
    ],
)
@pytest.mark.parametrize("bs", [0, 1, 16, 256, 700])
@pytest.mark.parametrize("spare", [-3, 0, 1000])
def test_ragged_lengths(function: Callable, bs: int, spare: int) -> None:
    extend_lens = [(r * r) % 7 - 1 for r in range(bs)]
    needed = sum(max(q, 0) for q in extend_lens)
    case = Case(
        seq_lens=[(911 * r) % 5000 for r in range(bs)],
        extend_lens=extend_lens,
        rows=max(needed + spare, 0),
        index_topk=2048,
    )
    guarded = Guarded(case, GPU)
    args = guarded.args
    expected = guarded.expected()
    arguments = (
        args.extend_lens,
        args.seq_lens,
        case.index_topk,
        args.seqlens_expanded,
        args.nsa_cache_seqlens,
    )
    function(*arguments)
    guarded.poison()
    with synchronising_is_an_error():
        rows = function(*arguments)
    for name in ("seq_lens", "extend_lens", "seqlens_expanded", "nsa_cache_seqlens"):
        assert torch.equal(guarded.memory[name], expected[name]), name
    assert (rows.dtype, rows.shape, rows.device) == (torch.int32, (), GPU)
    assert int(rows) == min(needed, args.rows)
