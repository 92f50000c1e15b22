"""How ``bench`` takes times and counts: alternating, in rounds, so that drift hits all paths alike."""

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
HOST_CALLS = 5  # one after another in a round of host times
HOST_ROUNDS, GPU_ROUNDS = (10, 100), (5, 30)  # least and most
# What the CUDA driver and runtime call work for the GPU, as the profiler names it.
GPU_WORK = ("LaunchKernel", "Memcpy", "Memset", "GraphLaunch")
# Of CUgraphNodeType, what a captured fill can hold.
NODE_KINDS = {0: "kernel", 1: "memcpy", 2: "memset", 5: "empty", 6: "event_wait", 7: "event_record"}
COPY_BYTES = 1 << 30


def host_times(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Host microseconds of each call on an idle GPU, dispatch only, in so many seconds."""
    measures = {name: functools.partial(_host_us, call) for name, call in calls.items()}
    return _alternate(measures, HOST_ROUNDS, seconds)


def gpu_times(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """GPU microseconds of each call: the slope between graphs of one and of REPEATS calls.

    The slope leaves the launch of the graph out. Calls must not wait for the device.
    """
    for call in calls.values():  # all of them first: a graph keeps what its calls allocate
        call()
    pool = torch.cuda.graph_pool_handle()  # graphs run one after another: they can share memory
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
    """Each measure once a round; after one round to warm up, as many as fit into the time."""
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
    """Median and quartiles, which a few outliers do not move."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_us(call: Call) -> float:
    """Median of HOST_CALLS calls in a row, the GPU idle before each.

    The call before them is not counted: it finds in the CPU's caches what other paths left there.
    """
    _dispatch_us(call)
    return statistics.median(_dispatch_us(call) for _ in range(HOST_CALLS))


def _dispatch_us(call: Call) -> float:
    _wait()
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1000


def capture(call: Call, keep: bool = False) -> torch.cuda.CUDAGraph:
    """A graph of one call, after one that loads and compiles what the call needs."""
    call()
    return _record(call, keep=keep)


def _record(call: Call, count: int = 1, pool: Any = None, keep: bool = False) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, of which one has run before."""
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
    """What a graph node costs that does nothing: the slope over empty kernels."""
    import triton

    @triton.jit  # type: ignore[untyped-decorator]
    def nothing():  # type: ignore[no-untyped-def]
        pass

    return spread(gpu_times({"empty": lambda: nothing[(1,)]()}, seconds)["empty"])


def launch_us(seconds: float) -> dict[str, float]:
    """Host time of the shortest call that torch has for launching one kernel, which ends at once."""
    return spread(host_times({"launch": lambda: torch.cuda._sleep(0)}, seconds)["launch"])


def copy_gb_s(seconds: float) -> dict[str, float]:
    """Bytes read and written a second, in GB, by a kernel that passes 1 GiB through.

    A copy in a graph may go to a copy engine, which is slower.
    """
    source = torch.ones(COPY_BYTES // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = gpu_times({"copy": lambda: torch.neg(source, out=target)}, seconds)["copy"]
    return spread([2 * COPY_BYTES / us / 1000 for us in times])


def launches(call: Call) -> int:
    """Kernels, copies and graphs that one call gives the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    # Calls of the CUDA runtime and driver; what they start on the GPU has names of its own.
    runtime = [event.name for event in found.events() if event.name.startswith("cu")]
    return sum(any(work in name for work in GPU_WORK) for name in runtime)


def graph_nodes(call: Call) -> dict[str, int]:
    """Nodes of the graph that one captured call makes, by kind."""
    graph = capture(call, keep=True)
    driver = ctypes.CDLL("libcuda.so.1")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    _ask(driver.cuGraphGetNodes(handle, None, ctypes.byref(count)))
    if count.value == 0:
        return {}
    nodes = (ctypes.c_void_p * count.value)()
    _ask(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)))
    kinds: Counter[str] = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        _ask(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kinds[NODE_KINDS.get(kind.value, f"kind {kind.value}")] += 1
    return dict(kinds)


def _ask(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"the CUDA driver could not list the nodes of a graph: error {code}")


@contextlib.contextmanager
def counted_compiles() -> Iterator[Counter[str]]:
    """Kernels that Triton compiles, or loads compiled, in the block, by the package that they are of."""
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
