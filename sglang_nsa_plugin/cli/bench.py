"""``sglang-nsa-plugin bench``: SGLang's own draft-extend fill and ours, same tensors, same run.

Host time is what a step pays before the forward: SGLang's call that plans the draft-extend step, on an
idle GPU, median of the calls; beside it, how much that call gives the GPU to do. GPU time is that of the
launches alone: they are captured once and 21 times in CUDA graphs, and the slope between the two
replays leaves the launch of the graph out. A release that plans draft-extend eagerly cannot be captured:
there the GPU time is left out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

REPEATS = 21
DRAFT_TOKENS = 4
CONTEXT = 163_840
EXPAND_BATCH_SIZES = (1, 8, 32, 64, 128, 256, 512, 1024)
# What the CUDA driver and runtime call work for the GPU, as the profiler names it.
GPU_WORK = ("LaunchKernel", "Memcpy", "Memset", "GraphLaunch")


@dataclass(frozen=True)
class Grid:
    """The cases of one run, and how often each is called."""

    decode_impls: tuple[str, ...] = ("flashmla_sparse", "flashmla_kv")
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    lengths: tuple[int, ...] = (2_048, 32_768, 131_072)
    calls: int = 300

    def cases(self) -> list[tuple[int, int]]:
        """Requests and length of each case."""
        return [(bs, length) for bs in self.batch_sizes for length in self.lengths]


QUICK = Grid(("flashmla_sparse",), (1, 64), (2_048, 131_072), 100)


def run(json_path: str | None, quick: bool = False) -> int:
    """Times every case, prints a table and returns 0."""
    import torch

    console = Console()
    if not torch.cuda.is_available():
        raise SystemExit("sglang-nsa-plugin bench: needs an NVIDIA GPU, torch sees none")
    result = measure(QUICK if quick else Grid(), console)
    if not quick:
        device = torch.device("cuda", torch.cuda.current_device())
        result["expand"] = [_expand_case(device, bs) for bs in EXPAND_BATCH_SIZES]
    _print(console, result)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(grid: Grid, console: Console) -> dict[str, Any]:
    """Every case of the grid, with what was measured."""
    import torch

    from sglang_nsa_plugin.cli.stand_ins import missing_for
    from sglang_nsa_plugin.cli.twins import make_twin
    from sglang_nsa_plugin.state import STATE

    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for impl in grid.decode_impls:
        missing = missing_for(impl)
        if missing is not None:
            console.print(f"{impl} is left out: {missing}")
            continue
        twin = make_twin(
            device,
            grid.batch_sizes,
            draft_tokens=DRAFT_TOKENS,
            context_len=CONTEXT,
            pool_size=grid.batch_sizes[-1] + 1,
            decode_impl=impl,
        )
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for bs, length in progress.track(grid.cases(), description=impl):
                rows.append({"decode_impl": impl, **_case(twin, bs, length, grid.calls)})
    return {
        "sglang": version("sglang"),
        "gpu": torch.cuda.get_device_name(device),
        "draft_tokens": DRAFT_TOKENS,
        "req_to_token_width": CONTEXT + 64,
        "adapter": STATE.adapter,
        "implementation": STATE.backend,
        "cases": rows,
    }


def _case(twin: Any, bs: int, length: int, calls: int) -> dict[str, Any]:
    """Times of one batch: requests of equal length, each with its own row of the pool."""
    import torch

    from sglang_nsa_plugin.cli.replay import Comparison, Twin

    twin.inputs.seq_lens[:bs].fill_(length)
    twin.inputs.req_pool_indices[:bs].copy_(torch.arange(1, bs + 1))
    compared = Comparison()
    twin.step(bs, compared)
    if compared.first is not None:
        raise RuntimeError(f"not timed, because values differ: {compared.first}")
    with twin.stand_ins():
        planned = {"sglang": twin.sglang_before_replay(bs), "ours": twin.before_replay(bs)}
        return {
            "requests": bs,
            "length": length,
            "values_compared": sum(compared.compared.values()),
            "host_us": {name: _host_us(call, calls) for name, call in planned.items()},
            "launches": {name: _launches(call) for name, call in planned.items()},
            **({"gpu_us": _gpu_case(twin, bs)} if isinstance(twin, Twin) else {}),
        }


def _gpu_case(twin: Any, bs: int) -> dict[str, float]:
    fill, derived = twin.fill(bs), twin.derived(bs)

    def ours() -> None:
        fill()
        derived()

    return {
        "sglang": _gpu_us(twin.sglang_before_replay(bs)),
        "ours": _gpu_us(ours),
        "sglang_kernel": _gpu_us(twin.sglang_kernel(bs)),
        "our_kernel": _gpu_us(fill),
    }


def _expand_case(device: Any, bs: int) -> dict[str, Any]:
    """``fill_draft_extend_metadata_cuda`` on bs requests: one block, and as many as the rows need."""
    import torch

    from sglang_nsa_plugin import fill_draft_extend_metadata_cuda

    def numbers(value: int, count: int) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    extend_lens, seq_lens = numbers(DRAFT_TOKENS, bs), numbers(40_000, bs)
    expanded, clamped = numbers(0, bs * DRAFT_TOKENS), numbers(0, bs * DRAFT_TOKENS)

    def gpu_us(use_adaptive: bool) -> float:
        return _gpu_us(
            lambda: fill_draft_extend_metadata_cuda(
                extend_lens, seq_lens, 2_048, expanded, clamped, use_adaptive
            )
        )

    return {"requests": bs, "gpu_us": {"one_block": gpu_us(False), "adaptive": gpu_us(True)}}


def _host_us(call: Callable[[], object], calls: int) -> float:
    """Median host microseconds of a call on an idle GPU, dispatch only."""
    import torch

    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1000)
    return round(statistics.median(samples), 1)


def _launches(call: Callable[[], object]) -> int:
    """Kernels, copies and graphs that one call gives the GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(any(work in event.name for work in GPU_WORK) for event in _runtime_calls(found))


def _runtime_calls(found: Any) -> list[Any]:
    """Calls of the CUDA runtime and driver; what they start on the GPU has names of its own."""
    return [event for event in found.events() if event.name.startswith("cu")]


def _gpu_us(call: Callable[[], object]) -> float:
    """GPU microseconds of one call: the slope between a graph of one and one of REPEATS calls."""
    one, many = (_replay_us(call, count) for count in (1, REPEATS))
    return round((many - one) / (REPEATS - 1), 2)


def _replay_us(call: Callable[[], object], count: int) -> float:
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    samples: list[float] = []
    for _ in range(100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(float(begin.elapsed_time(end)) * 1000)
    return statistics.median(samples)


def _print(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"SGLang {result['sglang']} on {result['gpu']}, adapter {result['adapter']}, implementation "
        f"{result['implementation']}, {DRAFT_TOKENS} draft tokens"
    )
    for impl in dict.fromkeys(row["decode_impl"] for row in result["cases"]):
        console.print(_table(impl, [row for row in result["cases"] if row["decode_impl"] == impl]))


def _table(impl: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"planning one draft-extend step, {impl}: SGLang / ours")
    for column in ("requests", "length", "host µs", "launches", "GPU µs", "kernel alone µs"):
        table.add_column(column, justify="right")
    for row in rows:
        gpu = row.get("gpu_us")
        table.add_row(
            f"{row['requests']}",
            f"{row['length']:,}",
            f"{row['host_us']['sglang']:.0f} / {row['host_us']['ours']:.1f}",
            f"{row['launches']['sglang']} / {row['launches']['ours']}",
            f"{gpu['sglang']:.1f} / {gpu['ours']:.1f}" if gpu else "-",
            f"{gpu['sglang_kernel']:.1f} / {gpu['our_kernel']:.1f}" if gpu else "-",
        )
    return table
