"""``sglang-nsa-plugin bench``: SGLang's own draft-extend fill and the plugin's, same tensors, same run.

The values of all paths are compared first. The paths are then timed in alternating rounds, so that drift
affects all of them equally.

Host time is what a step pays before the forward pass: one call on an idle GPU, until it returns. The
caches are warm, because the same call has just run; in a server they are colder. GPU time is that of the
launches only: one and 21 of them are captured in CUDA graphs, and the slope between the two replays
excludes the graph's own launch. Releases that plan draft-extend eagerly cannot be captured and have no
GPU time. Without a GPU only the implementations that run on a CPU are timed.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from sglang_nsa_plugin.cli import environment, files, terminal
from sglang_nsa_plugin.cli.bench import cases, paths, report, timing
from sglang_nsa_plugin.cli.bench.cases import BOTH, PAGED, Case, DirectFills, Grid, Setup
from sglang_nsa_plugin.cli.bench.paths import ORIGINAL, OURS, SGLANG, SGLANG_KERNEL
from sglang_nsa_plugin.harness.inputs import Inputs, make_inputs
from sglang_nsa_plugin.kernels import torch as torch_reference

EXPAND_BATCH_SIZES = (1, 8, 32, 64, 128, 256, 512, 1024)
THEIRS = (SGLANG, SGLANG_KERNEL)
DRAFT_TOKENS = 4


def run(json_path: str | None, plot_path: str | None = None, quick: bool = False) -> int:
    """Times every case, prints the tables and returns 0."""
    console = terminal.console()
    files.raise_if_unwritable(json_path, plot_path)
    if plot_path:
        # First, so that a missing matplotlib costs no minutes.
        from sglang_nsa_plugin.cli.bench import plot
    begin = time.monotonic()
    with terminal.progress(console) as progress:
        result = _measured(progress, quick)
    result["seconds"] = round(time.monotonic() - begin, 1)
    files.write_and_show(
        result,
        json_path,
        lambda: report.show(console, result),
        (lambda: plot.draw(result, Path(plot_path))) if plot_path else None,
    )
    return 0


def _measured(progress: Progress, quick: bool) -> dict[str, Any]:
    bar = progress.add_task("loading SGLang", total=None)
    if not torch.cuda.is_available():
        return {
            "gpu": None,
            "note": report.NO_GPU,
            **_cases(cases.ON_CPU, torch.device("cpu"), progress, bar, _cpu_setup),
        }
    from sglang_nsa_plugin.adapters import in_graph
    from sglang_nsa_plugin.state import STATE

    device = torch.device("cuda", torch.cuda.current_device())
    measured: dict[str, Any] = {}
    if in_graph.is_generation():
        grid = cases.QUICK if quick else cases.FULL
        measured = {
            "floor_us": timing.floor_us(grid.seconds),
            "launch_us": timing.launch_us(grid.seconds),
            "copy_gb_s": timing.copy_gb_s(grid.seconds),
            "copy_by": "kernel",
        }
        measured |= _cases(grid, device, progress, bar, _graph_setup)
        for row in measured["cases"]:
            row["copy_share"] = _copy_share(row, measured["copy_gb_s"]["median"])
    else:
        measured = _cases(cases.EAGER, device, progress, bar, _eager_setup)
    if not quick:
        measured["expand"] = [_expand_case(device, bs) for bs in EXPAND_BATCH_SIZES]
    of_draft_extend = {"adapter": STATE.adapter, "implementation": STATE.backend}
    measured["roles"] = _roles(device, progress, bar)  # asks for one role after the other
    return {
        "sglang": environment.sglang()["version"],
        "gpu": torch.cuda.get_device_name(device),
        **of_draft_extend,
        **measured,
    }


def _roles(device: torch.device, progress: Progress, bar: TaskID) -> list[dict[str, Any]]:
    from sglang_nsa_plugin.cli.bench import roles

    here, grid = roles.measured_here(), cases.ROLES
    each = sum(len(setup.cases()) for setup in grid.setups)
    progress.reset(bar, description="roles", total=each * len(here))
    advance = functools.partial(progress.update, bar, advance=1)
    return list(roles.rows(grid, device, here, lambda what: advance(description=what)))


class Run:
    """What the set-ups of one run share.

    Attributes:
        advance: moves the progress bar by one case; takes the description of that case.
        warm: whether the plugin has filled once with each choice of tables, as when a server starts.
    """

    def __init__(self, grid: Grid, device: torch.device, advance: Callable[[str], None]) -> None:
        self.grid = grid
        self.device = device
        self.advance = advance
        self.warm = False


MeasureSetup = Callable[[Run, Setup], list[dict[str, Any]]]


def _cases(
    grid: Grid,
    device: torch.device,
    progress: Progress,
    bar: TaskID,
    measure_setup: MeasureSetup,
) -> dict[str, Any]:
    """The rows of every case of every set-up that can run here."""
    from sglang_nsa_plugin.harness.process_stubs import why_unavailable

    missing = {setup.decode_impl: why_unavailable(setup.decode_impl) for setup in grid.setups}
    for impl, why_not in missing.items():
        if why_not is not None:
            progress.console.print(f"{impl} is skipped: {why_not}")
    setups = [setup for setup in grid.setups if missing[setup.decode_impl] is None]
    rows: list[dict[str, Any]] = []
    progress.update(bar, total=sum(len(setup.cases()) for setup in setups))
    run = Run(grid, device, lambda what: progress.update(bar, advance=1, description=what))
    for setup in setups:
        rows += measure_setup(run, setup)
        gc.collect()  # a backend and the plugin's fill refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"cases": rows}


def _cpu_setup(run: Run, setup: Setup) -> list[dict[str, Any]]:
    """The implementations that run on a CPU, compared with the torch reference."""
    inputs = _inputs(run.device, setup)
    ours, expected = (DirectFills(inputs, max(setup.requests), setup.draft_tokens) for _ in range(2))
    rows = []
    for case in setup.cases():
        cases.write_lengths(inputs, case)
        for tables in (BOTH, PAGED):
            args, reference = (fills.args(case.requests, tables) for fills in (ours, expected))
            torch_reference.fill(reference)
            calls = paths.direct(ours, case.requests, tables)
            values = paths.compare(calls, args, reference.outputs())
            host = timing.host_times(calls, run.grid.seconds)
            rows.append({**_described(setup, case, tables, values), **_times(host, {})})
        run.advance(f"{case.requests} requests")
    return rows


def _graph_setup(run: Run, setup: Setup) -> list[dict[str, Any]]:
    """All paths, where SGLang runs draft-extend in CUDA graphs."""
    pair = paths.pair_of(run.device, setup)
    fills = DirectFills(pair.inputs, max(setup.requests), setup.draft_tokens)
    cases.write_slots(pair.inputs)
    rows: list[dict[str, Any]] = []
    with pair.stub_process():
        if not run.warm:
            for tables in (BOTH, PAGED):  # compiles what a server compiles when it starts
                for call in paths.direct(fills, min(setup.requests), tables).values():
                    call()
            run.warm = True
        for case in setup.cases():
            cases.write_lengths(pair.inputs, case)
            rows += _graph_case(run, setup, case, pair, fills)
            run.advance(f"{setup.decode_impl}, width {setup.width:,}, {case.requests} × {case.length:,}")
    return rows


def _graph_case(
    run: Run, setup: Setup, case: Case, pair: Any, fills: DirectFills
) -> list[dict[str, Any]]:
    """Two rows: one for both page tables, one for the page-64 table only."""
    bs = case.requests
    with timing.counted_compiles() as at_first:
        values = paths.step(pair, bs)
    sglang = paths.sglang_values(pair, bs)
    recorded = _recorded(pair, bs)
    rows = []
    for tables in (BOTH, PAGED):
        is_recorded = tables == paths.recorded_tables(pair, bs)
        with timing.counted_compiles() as compiled:
            calls = paths.direct(fills, bs, tables)
            compared = paths.compare(calls, fills.args(bs, tables), sglang)
            timed = paths.with_sglang(pair, fills, bs, tables)
            host = timing.host_times(timed.host, run.grid.seconds / 2)
            gpu = timing.gpu_times(timed.gpu, run.grid.seconds / 2)
        row = {**_described(setup, case, tables, compared), **_times(host, gpu)}
        compiled += at_first if is_recorded else {}
        row["compiles"] = {SGLANG: compiled["sglang"], OURS: compiled["sglang_nsa_plugin"]}
        if is_recorded:
            row["values_compared"] += values
            row |= recorded
        rows.append(row)
    return rows


def _recorded(pair: Any, bs: int) -> dict[str, Any]:
    """What does not depend on the lengths: graph nodes, host launches, memory."""
    planned = {SGLANG: pair.sglang_before_replay(bs), OURS: pair.before_replay(bs)}
    return {
        "nodes": timing.graph_nodes(pair.recording(bs)),
        # counted as graph nodes: a profiler would slow down what is timed after it
        "launches": {name: sum(timing.graph_nodes(call).values()) for name, call in planned.items()},
        "memory_bytes": {
            SGLANG: paths.memory_bytes(pair.theirs.backend.decode_cuda_graph_metadata[bs]),
            OURS: paths.memory_bytes(pair.metadata(bs)),
        },
    }


def _eager_setup(run: Run, setup: Setup) -> list[dict[str, Any]]:
    """SGLang's call that plans an eager step, and the plugin's."""
    pair = paths.pair_of(run.device, setup)
    cases.write_slots(pair.inputs)
    rows = []
    for case in setup.cases():
        cases.write_lengths(pair.inputs, case)
        bs = case.requests
        values = paths.step(pair, bs)
        with pair.stub_process():
            calls = {SGLANG: pair.sglang_before_replay(bs), OURS: pair.before_replay(bs)}
            host = timing.host_times(calls, run.grid.seconds)
            row = {**_described(setup, case, BOTH, values), **_times(host, {})}
            rows.append({**row, "launches": _launches(pair, bs)})
        run.advance(f"{setup.decode_impl}, {bs} × {case.length:,}")
    return rows


def _inputs(device: torch.device, setup: Setup) -> Inputs:
    requests = max(setup.requests)
    inputs = make_inputs(device, requests, requests + 1, setup.width, cases.PAGE)
    cases.write_slots(inputs)
    return inputs


def _launches(pair: Any, bs: int) -> dict[str, int]:
    return {
        SGLANG: timing.launches(pair.sglang_before_replay(bs)),
        OURS: timing.launches(pair.before_replay(bs)),
    }


def _described(setup: Setup, case: Case, tables: str, values: int) -> dict[str, Any]:
    return {
        "decode_impl": setup.decode_impl,
        "requests": case.requests,
        "length": case.length,
        "width": setup.width,
        "draft_tokens": setup.draft_tokens,
        "tables": tables,
        "values_compared": values,
        "bytes": cases.bytes_to_move(case, setup.draft_tokens, tables),
    }


def _times(host: Mapping[str, list[float]], gpu: Mapping[str, list[float]]) -> dict[str, Any]:
    """By path: medians, quartiles, and ratios to SGLang."""
    times: dict[str, Any] = {}
    for name, samples in (("host", host), ("gpu", gpu)):
        if not samples:
            continue
        spreads = {path: timing.spread(each) for path, each in samples.items()}
        times[f"{name}_us"] = {path: each["median"] for path, each in spreads.items()}
        times[f"{name}_quartiles"] = {path: [each["q1"], each["q3"]] for path, each in spreads.items()}
        times[f"{name}_over_sglang"] = _over_sglang(times[f"{name}_us"])
    return times


def _over_sglang(times: dict[str, float]) -> dict[str, float]:
    """The ratio of each path to SGLang: whole fills to its whole fill, kernels to its kernel."""
    whole, kernel = times.get(SGLANG), times.get(SGLANG_KERNEL)
    reference = {OURS: whole, ORIGINAL: whole}
    ratios = {
        path: (us, reference.get(path, kernel)) for path, us in times.items() if path not in THEIRS
    }
    return {path: round(us / base, 4) for path, (us, base) in ratios.items() if base}


def _copy_share(row: dict[str, Any], copy_gb_s: float) -> dict[str, float]:
    """The bandwidth of each kernel, bytes that a fill must move over its time, as a share of a copy's.

    Whole fills move more than these bytes and are left out.
    """
    moved = sum(row["bytes"].values())
    return {
        path: round(moved / us / 1000 / copy_gb_s, 4)
        for path, us in row["gpu_us"].items()
        if path not in (SGLANG, OURS)
    }


def _expand_case(device: torch.device, bs: int) -> dict[str, Any]:
    """``fill_draft_extend_metadata_cuda`` of ``bs`` requests, with one block and with all it needs."""
    from sglang_nsa_plugin import fill_draft_extend_metadata_cuda

    def numbers(value: int, count: int) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    extend_lens, seq_lens = numbers(DRAFT_TOKENS, bs), numbers(40_000, bs)
    expanded, clamped = numbers(0, bs * DRAFT_TOKENS), numbers(0, bs * DRAFT_TOKENS)

    def gpu_us(use_adaptive: bool) -> float:
        def call() -> object:
            return fill_draft_extend_metadata_cuda(
                extend_lens, seq_lens, cases.INDEX_TOPK, expanded, clamped, use_adaptive
            )

        return timing.spread(timing.gpu_times({"expand": call}, 0.2)["expand"])["median"]

    return {"requests": bs, "gpu_us": {"one_block": gpu_us(False), "adaptive": gpu_us(True)}}
