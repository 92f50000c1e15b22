"""How ``bench`` times and counts calls."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Call = Callable[[], object]
REPEATS = 21
HOST_CALLS = 5  # back-to-back calls in one round of host times
HOST_ROUNDS, GPU_ROUNDS = (10, 100), (5, 30)  # minimum and maximum
# Parts of the names by which the profiler lists CUDA calls that give the GPU work.
GPU_WORK = ("LaunchKernel", "Memcpy", "Memset", "GraphLaunch")
# The values of CUgraphNodeType that a captured fill can have.
NODE_KINDS = {0: "kernel", 1: "memcpy", 2: "memset", 5: "empty", 6: "event_wait", 7: "event_record"}
COPY_BYTES = 1 << 30


def host_times(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Host microseconds of each call on an idle GPU, until it returns; takes about ``seconds``."""
    measures = {name: functools.partial(_host_us, call) for name, call in calls.items()}
    return _alternate(measures, HOST_ROUNDS, seconds)


def gpu_times(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """GPU microseconds of each call: the slope between graphs of one and of REPEATS calls.

    The slope excludes the launch of the graph. The calls must not wait for the device.
    """
    for call in calls.values():  # all before the first capture: a graph keeps the memory of its calls
        call()
    pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they can share memory
    slopes: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        one, many = (_record(call, count, pool) for count in (1, REPEATS))
        slopes[name] = functools.partial(_slope_us, one, many)
    return _alternate(slopes, GPU_ROUNDS, seconds)


def _slope_us(one: torch.cuda.CUDAGraph, many: torch.cuda.CUDAGraph) -> float:
    return (_replay_us(many) - _replay_us(one)) / (REPEATS - 1)


def _alternate(
    measures: Mapping[str, Callable[[], float]], rounds: tuple[int, int], seconds: float
) -> dict[str, list[float]]:
    """Takes each measure once a round, for ``seconds``, after one round to warm up.

    Alternating, so that drift affects all paths equally.
    """
    least, most = rounds
    for measure in measures.values():
        measure()
    samples: dict[str, list[float]] = {name: [] for name in measures}
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, measure in measures.items():
            samples[name].append(measure())
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles: a few outliers do not change them."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_us(call: Call) -> float:
    """Median of HOST_CALLS back-to-back calls, with the GPU idle before each.

    One call before them is not counted: its CPU caches are filled by other paths.
    """
    _dispatch_us(call)
    return statistics.median(_dispatch_us(call) for _ in range(HOST_CALLS))


def _dispatch_us(call: Call) -> float:
    _wait()
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1000


def capture(call: Call, keep: bool = False) -> torch.cuda.CUDAGraph:
    """A graph of one call, after a call that loads and compiles what is needed."""
    call()
    return _record(call, keep=keep)


def _record(call: Call, count: int = 1, pool: Any = None, keep: bool = False) -> torch.cuda.CUDAGraph:
    """A graph of ``count`` calls; the call must have run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=keep)
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(count):
            call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def floor_us(seconds: float) -> dict[str, float]:
    """Microseconds of a graph node that does nothing: the slope over empty kernels."""
    import triton

    @triton.jit  # type: ignore[untyped-decorator]
    def nothing():  # type: ignore[no-untyped-def]
        pass

    return spread(gpu_times({"empty": lambda: nothing[(1,)]()}, seconds)["empty"])


def launch_us(seconds: float) -> dict[str, float]:
    """Host microseconds of torch's shortest call that launches one kernel, which ends at once."""
    return spread(host_times({"launch": lambda: torch.cuda._sleep(0)}, seconds)["launch"])


def copy_gb_s(seconds: float) -> dict[str, float]:
    """Bandwidth of a kernel that reads and writes 1 GiB, reads plus writes in GB/s.

    A real copy in a graph may run on a copy engine, which is slower.
    """
    source = torch.ones(COPY_BYTES // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = gpu_times({"copy": lambda: torch.neg(source, out=target)}, seconds)["copy"]
    return spread([2 * COPY_BYTES / us / 1000 for us in times])


def launches(call: Call) -> int:
    """Number of kernels, copies and graphs that one call launches."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    # Calls of the CUDA runtime and driver begin with cu; what runs on the GPU has other names.
    runtime = [event.name for event in recorded.events() if event.name.startswith("cu")]
    return sum(any(work in name for work in GPU_WORK) for name in runtime)


def graph_nodes(call: Call) -> dict[str, int]:
    """Number of nodes in the graph of one captured call, by kind."""
    graph = capture(call, keep=True)
    driver = ctypes.CDLL("libcuda.so.1")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(handle, None, ctypes.byref(count)))
    if count.value == 0:
        return {}
    nodes = (ctypes.c_void_p * count.value)()
    _check(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)))
    kinds: Counter[str] = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kinds[NODE_KINDS.get(kind.value, f"kind {kind.value}")] += 1
    return dict(kinds)


def _check(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"the CUDA driver could not list the nodes of a graph: error {code}")


@contextlib.contextmanager
def counted_compiles() -> Iterator[Counter[str]]:
    """Number of kernels that Triton compiles or loads from its cache in the block, by their package."""
    from triton import knobs

    counts: Counter[str] = Counter()

    def count(*, fn: Any, **_: Any) -> None:
        counts[fn.module.partition(".")[0]] += 1

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = count
    try:
        yield counts
    finally:
        knobs.runtime.jit_post_compile_hook = before
