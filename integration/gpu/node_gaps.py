"""How closely the nodes of one CUDA graph follow one another, by what ran on the stream before it.

    python -m integration.gpu.node_gaps [--json FILE] [--repeats 15]

Needs an NVIDIA GPU, torch and Triton; no SGLang. Graphs of 1,000 small kernels are replayed after
different preludes, each from three starting points: right after a replay that followed 24 plain kernels,
right after one that followed a kernel with programmatic launch, and after three replays with the same
prelude, as a server has them. The first and the last kernel of a
graph write the GPU's clock, so its time is known without a profiler and without an event. Each situation
is a process of its own: alone on the GPU, beside another process, with more or fewer hardware queues,
and last of all under the profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from integration import result_files
from integration.gpu.small_kernels import add_one, add_one_programmatic, write_clock

NODES = 1_000
BRANCH_EVERY = 10
ELEMENTS = 1_024
BUSY_CYCLES = 3_000_000  # longer than the host takes to launch a graph
TWICE = "programmatic, the graph twice"
SAME = "the same"  # before the replay that is timed, so many like it
SETTLING = 3
SIDE_LIMIT_S = 300  # a process beside ends by itself after so long
PROCESS_LIMIT_S = 240
GPU_QUERY = "clocks.sm,clocks.mem,clocks_event_reasons.active,compute_mode,pstate"

Call = Callable[[], object]
Row = dict[str, Any]


def several(*calls: Call) -> Call:
    """One call that makes these, in their order."""

    def make() -> None:
        for call in calls:
            call()

    return make


class Kernels:
    """The small kernels, over one tensor a stream."""

    def __init__(self) -> None:
        self.x = torch.zeros(ELEMENTS, dtype=torch.int32, device="cuda")
        self.side = torch.zeros_like(self.x)
        self.clock = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.small = torch.zeros(10, dtype=torch.int32, device="cuda")
        self.pinned = {n: torch.zeros(n, dtype=torch.uint8).pin_memory() for n in (40, 8_192)}
        self.bytes = {n: torch.zeros(n, dtype=torch.uint8, device="cuda") for n in self.pinned}
        self.a = torch.randn(16, 16_384, dtype=torch.bfloat16, device="cuda")
        self.b = torch.randn(16_384, 64, dtype=torch.bfloat16, device="cuda")

    def plain(self, on_side: bool = False) -> None:
        add_one[(1,)](self.side if on_side else self.x, ELEMENTS, num_warps=1)

    def programmatic(self) -> None:
        add_one_programmatic[(1,)](self.x, ELEMENTS, num_warps=1, launch_pdl=True)

    def programmatic_on_side(self) -> None:
        add_one_programmatic[(1,)](self.side, ELEMENTS, num_warps=1, launch_pdl=True)

    def copy(self, size: int) -> None:
        self.bytes[size].copy_(self.pinned[size], non_blocking=True)

    def copy_back(self, size: int) -> None:
        self.pinned[size].copy_(self.bytes[size], non_blocking=True)

    def split_k(self) -> None:
        torch.mm(self.a, self.b)  # few tiles and a long sum: cuBLAS splits the sum


def capture(body: Call) -> torch.cuda.CUDAGraph:
    """A graph of ``body``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    return graph


def fork(main: Call, side: Call) -> None:
    """Two branches of a graph that is captured, the side branch recorded first."""
    stream, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(stream)
    with torch.cuda.stream(other):
        side()
    main()
    stream.wait_stream(other)


def graphs(kernels: Kernels) -> dict[str, torch.cuda.CUDAGraph]:
    """Chains of :data:`NODES` kernels, and the same with a side branch every ten nodes."""

    def alternate() -> None:
        for node in range(NODES):
            kernels.programmatic() if node % 2 else kernels.plain()

    def forked(side_first: bool) -> None:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()

        def branch() -> None:
            with torch.cuda.stream(side):
                kernels.plain(on_side=True)

        for _ in range(NODES // BRANCH_EVERY):
            side.wait_stream(main)
            if side_first:
                branch()
            for _ in range(BRANCH_EVERY - 1):
                kernels.plain()
            if not side_first:
                branch()
            main.wait_stream(side)

    bodies: dict[str, Call] = {
        "plain": several(*[kernels.plain] * NODES),
        "every second programmatic": alternate,
        "side branches, main first": lambda: forked(False),
        "side branches, side first": lambda: forked(True),
    }
    begin, end = (functools.partial(write_clock[(1,)], kernels.clock, at) for at in range(2))
    return {name: capture(several(begin, body, end)) for name, body in bodies.items()}


def preludes(kernels: Kernels) -> dict[str, tuple[Call, Call]]:
    """What is launched before a replay, and what is launched after it, by name."""
    other, copies = torch.cuda.Stream(), torch.cuda.Stream()

    def nothing() -> None:
        pass

    def programmatic_elsewhere() -> None:
        with torch.cuda.stream(other):
            kernels.programmatic()

    def copy_after_the_graph() -> None:
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            kernels.copy_back(40)

    plain, programmatic = kernels.plain, kernels.programmatic
    forked = capture(lambda: fork(kernels.programmatic, kernels.programmatic_on_side))
    copy_8k, copy_40 = (lambda: kernels.copy(8_192)), (lambda: kernels.copy(40))
    before: dict[str, Call] = {
        "nothing": nothing,
        "plain, copy of 8 KiB": several(plain, plain, copy_8k),
        "plain, copy of 40 bytes": several(plain, plain, copy_40),
        "plain, programmatic": several(plain, programmatic),
        "plain, programmatic, copy": several(plain, programmatic, copy_8k),
        "plain, programmatic, plain, copy": several(plain, programmatic, plain, copy_8k),
        "split-K product": kernels.split_k,
        **{
            f"programmatic, {count} plain": several(programmatic, *[plain] * count)
            for count in (1, 2, 4, 8, 16, 24)
        },
        **{
            f"24 plain, {count} programmatic": several(*[plain] * 24, *[programmatic] * count)
            for count in (1, 2, 8)
        },
        "24 plain, a forked graph of programmatic ones": several(*[plain] * 24, forked.replay),
        "24 plain": several(*[plain] * 24),
        "24 plain, GPU idle again": several(*[plain] * 24, torch.cuda.synchronize),
        "GPU busy for a while": lambda: torch.cuda._sleep(BUSY_CYCLES),
        "programmatic, GPU busy for a while": several(
            programmatic, lambda: torch.cuda._sleep(BUSY_CYCLES)
        ),
        "programmatic on another stream": programmatic_elsewhere,
    }
    return {
        **{name: (call, nothing) for name, call in before.items()},
        "nothing, a copy stream waits for the end": (nothing, copy_after_the_graph),
    }


def measure(repeats: int, with_events: bool) -> list[Row]:
    """Microseconds from a graph's first kernel to its last, for each case, in shuffled order."""
    kernels = Kernels()
    with torch.cuda.stream(torch.cuda.Stream()):
        for warm_up in (kernels.plain, kernels.programmatic, kernels.split_k):
            warm_up()
        for at in range(2):
            write_clock[(1,)](kernels.clock, at)
        torch.cuda.synchronize()
        captured, cases = graphs(kernels), preludes(kernels)
        starts: dict[str, Call | None] = {
            "24 plain": several(*[kernels.plain] * 24),
            "programmatic": kernels.programmatic,
            SAME: None,
        }
        events = (False, True) if with_events else (False,)
        runs = list(itertools.product(captured, starts, [*cases, TWICE], events))
        samples: dict[tuple[str, str, str, bool], list[float]] = {run: [] for run in runs}
        shuffled = random.Random(0)
        for _ in range(repeats):
            shuffled.shuffle(runs)
            for name, start, prelude, event in runs:
                begin = starts[start]
                for _ in range(SETTLING if begin is None else 0):
                    _run(kernels, captured[name], cases.get(prelude), event)
                if begin is not None:
                    begin()
                    captured[name].replay()
                    torch.cuda.synchronize()
                us = _run(kernels, captured[name], cases.get(prelude), event)
                samples[name, start, prelude, event].append(us)
    return [
        {"graph": name, "start": start, "before": prelude, "event": event, "us": spread(times)}
        for (name, start, prelude, event), times in samples.items()
    ]


def _run(
    kernels: Kernels, graph: torch.cuda.CUDAGraph, case: tuple[Call, Call] | None, event: bool
) -> float:
    """One replay; without a case a programmatic kernel and two replays, of which the second is timed."""
    before, after = case or (several(kernels.programmatic, graph.replay), several())
    before()
    if event:
        torch.cuda.Event(enable_timing=True).record()
    graph.replay()
    after()
    torch.cuda.synchronize()
    begin, end = kernels.clock.tolist()
    return float(end - begin) / 1000


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = (round(each, digits) for each in statistics.quantiles(values, n=4))
    return {"median": median, "q1": q1, "q3": q3}


def measure_profiled(repeats: int) -> list[Row]:
    """The same under torch's profiler, which changes what it looks at."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        return measure(repeats, with_events=False)


def hold_context() -> None:
    """A process that has a context on the GPU and does nothing."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    print("ready", flush=True)
    time.sleep(SIDE_LIMIT_S)


def launch_every_millisecond() -> None:
    """A process that launches a small kernel a millisecond."""
    kernels = Kernels()
    kernels.plain()
    torch.cuda.synchronize()
    print("ready", flush=True)
    end = time.monotonic() + SIDE_LIMIT_S
    while time.monotonic() < end:
        kernels.plain()
        time.sleep(0.001)


BESIDE: dict[str, Call] = {"context": hold_context, "launches": launch_every_millisecond}
# Name of a situation: what runs beside it, CUDA_DEVICE_MAX_CONNECTIONS, whether it is profiled.
SITUATIONS: dict[str, tuple[str | None, str | None, bool]] = {
    "alone": (None, None, False),
    "beside a process that holds a context": ("context", None, False),
    "beside a process that launches a kernel a millisecond": ("launches", None, False),
    "alone again": (None, None, False),
    "1 connection": (None, "1", False),
    "8 connections": (None, "8", False),
    "32 connections": (None, "32", False),
    "profiled": (None, None, True),
}


@contextlib.contextmanager
def beside(name: str | None) -> Iterator[None]:
    """Runs one of :data:`BESIDE` as a process beside the block."""
    if name is None:
        yield
        return
    command = [sys.executable, "-m", "integration.gpu.node_gaps", "--beside", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"the process beside ({name}) ended before it was ready")
            yield
        finally:
            process.terminate()


def in_process(name: str, repeats: int) -> list[Row]:
    """What a fresh process measures in this situation."""
    other, connections, _ = SITUATIONS[name]
    command = [sys.executable, "-m", "integration.gpu.node_gaps", "--one", name]
    variables = {} if connections is None else {"CUDA_DEVICE_MAX_CONNECTIONS": connections}
    with beside(other):
        done = subprocess.run(
            [*command, "--repeats", str(repeats)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
            timeout=PROCESS_LIMIT_S,
            check=True,
        )
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return [{"situation": name, **row} for row in rows]


def host() -> dict[str, Any]:
    """What the driver says of the GPU, and whether the machine is a virtual one."""
    flags = Path("/proc/cpuinfo").read_text()
    return {
        "gpu": result_files.of_gpus(GPU_QUERY),
        "virtual": " hypervisor" in flags,
        "cuda": torch.version.cuda,
    }


def by_case(rows: list[Row]) -> Row:
    """The situations, and one row a case: its quartiles (first, median, third; µs) in each of them.

    None stands for a case that was not measured in a situation.
    """
    situations = list(dict.fromkeys(row["situation"] for row in rows))
    cases: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        case = {name: row[name] for name in ("graph", "start", "before", "event")}
        us = cases.setdefault(tuple(case.values()), {**case, "us": [None] * len(situations)})["us"]
        us[situations.index(row["situation"])] = [row["us"][name] for name in ("q1", "median", "q3")]
    return {"situations": situations, "rows": list(cases.values())}


def as_text(row: Row) -> str:
    """One line for a terminal."""
    us = row["us"]
    event = ", event" if row["event"] else ""
    return (
        f"{row['situation'][:24]:24} {row['graph']:26} after {row['start']:12} "
        f"{row['before'] + event:48} {us['median']:8.1f} us ({us['q1']:.1f} to {us['q3']:.1f})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--situations", nargs="+", choices=SITUATIONS, default=list(SITUATIONS))
    parser.add_argument("--one", choices=SITUATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--beside", choices=BESIDE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.beside:
        BESIDE[arguments.beside]()
        return 0
    if arguments.one:
        is_profiled = SITUATIONS[arguments.one][2]
        with_events = arguments.one == "alone"
        repeats = arguments.repeats
        print(json.dumps(measure_profiled(repeats) if is_profiled else measure(repeats, with_events)))
        return 0
    rows: list[Row] = []
    for name in arguments.situations:
        found = in_process(name, arguments.repeats)
        print("\n".join(map(as_text, found)), flush=True)
        rows += found
    if arguments.json:
        command = "python -m integration.gpu.node_gaps"
        result = {
            "command": command,
            **result_files.environment(),
            "host": host(),
            **by_case(rows),
        }
        arguments.json.write_text(result_files.as_text(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
