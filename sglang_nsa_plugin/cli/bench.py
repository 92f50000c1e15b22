"""``sglang-nsa-plugin bench``: SGLang's own draft-extend fill and ours, same tensors, same run.

Host time is what a step pays before the graph replay: the call of ``init_forward_metadata_out_graph``
on an idle GPU, median of ``CALLS``. GPU time is that of the launches alone: they are captured once and
21 times in CUDA graphs, and the slope between the two replays leaves the launch of the graph out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CALLS = 300
REPEATS = 21
DRAFT_TOKENS = 4
CONTEXT = 163_840
BATCH_SIZES = (1, 8, 32, 64)
EXPAND_BATCH_SIZES = (1, 8, 32, 64, 128, 256, 512, 1024)
LENGTHS = (2_048, 32_768, 131_072)
DECODE_IMPLS = ("flashmla_sparse", "flashmla_kv")


def run(json_path: str | None) -> int:
    """Times every case, prints a table and returns 0."""
    import torch

    console = Console()
    if not torch.cuda.is_available():
        raise SystemExit("sglang-nsa-plugin bench: needs an NVIDIA GPU, torch sees none")
    result = measure(console)
    _print(console, result)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(console: Console) -> dict[str, Any]:
    """The cases of both decode implementations, with what the machine was."""
    import torch

    from sglang_nsa_plugin.cli.replay import Twin
    from sglang_nsa_plugin.state import STATE

    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for impl in DECODE_IMPLS:
        twin = Twin(
            device,
            BATCH_SIZES,
            draft_tokens=DRAFT_TOKENS,
            context_len=CONTEXT,
            pool_size=BATCH_SIZES[-1] + 1,
            decode_impl=impl,
        )
        cases = [(bs, length) for bs in BATCH_SIZES for length in LENGTHS]
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for bs, length in progress.track(cases, description=impl):
                rows.append({"decode_impl": impl, **_case(twin, bs, length)})
    return {
        "draft_tokens": DRAFT_TOKENS,
        "req_to_token_width": CONTEXT + 64,
        "implementation": STATE.backend,
        "cases": rows,
        "expand": [_expand_case(device, bs) for bs in EXPAND_BATCH_SIZES],
    }


def _case(twin: Any, bs: int, length: int) -> dict[str, Any]:
    """Times of one batch: requests of equal length, each with its own row of the pool."""
    import torch

    twin.inputs.seq_lens[:bs].fill_(length)
    twin.inputs.req_pool_indices[:bs].copy_(torch.arange(1, bs + 1))
    fill, derived = twin.fill(bs), twin.derived(bs)

    def ours() -> None:
        fill()
        derived()

    with twin.stand_ins():
        return {
            "requests": bs,
            "length": length,
            "host_us": {
                "sglang": _host_us(twin.sglang_before_replay(bs)),
                "ours": _host_us(twin.before_replay(bs)),
            },
            "gpu_us": {
                "sglang": _gpu_us(twin.sglang_before_replay(bs)),
                "ours": _gpu_us(ours),
                "sglang_kernel": _gpu_us(twin.sglang_kernel(bs)),
                "our_kernel": _gpu_us(fill),
            },
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


def _host_us(call: Callable[[], object]) -> float:
    """Median host microseconds of a call on an idle GPU, dispatch only."""
    import torch

    samples = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1000)
    return round(statistics.median(samples), 1)


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
    for _ in range(CALLS // 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(float(begin.elapsed_time(end)) * 1000)
    return statistics.median(samples)


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"one draft-extend fill, {DRAFT_TOKENS} draft tokens, microseconds")
    for column in ("decode", "requests", "length", "host: SGLang", "ours"):
        table.add_column(column, justify="right")
    for column in ("GPU: SGLang", "ours", "kernel alone: SGLang", "ours"):
        table.add_column(column, justify="right")
    for row in result["cases"]:
        times = (*row["host_us"].values(), *row["gpu_us"].values())
        table.add_row(
            row["decode_impl"],
            f"{row['requests']}",
            f"{row['length']:,}",
            *(f"{microseconds:.1f}" for microseconds in times),
        )
    console.print(table)
