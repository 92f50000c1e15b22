"""``make bench``: the full bench of the installed SGLang on this GPU, into a committed result file.

    python -m integration.gpu.bench [--only bench|gather|bare|widths|copies|dram ...]

Writes integration/results/bench-GPU-VERSION.json, or below NSA_RESULTS_DIR. A run of all parts is then
compared with the committed file of this GPU and exits with 1 where something got slower (bounds.py):

``bench``   what ``sglang-nsa-plugin bench`` measures.
``gather``  a floor for the page-64 table: torch reads one slot of each page, 256 bytes apart.
``bare``    another floor: a kernel that is given what the fill has to look up (gather_floor.py).
``widths``  tables of different widths in turn; in ``bench`` minutes lie between them.
``copies``  how fast torch's copy and the driver's memset, which reads nothing, write the rows of the
            wide table to the same places.
``dram``    what ncu counts in three fills, next to the bytes that they must move.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration import result_files
from integration.gpu import bounds

if TYPE_CHECKING:
    import torch

    from sglang_nsa_plugin.cli.bench.cases import DirectFills, Setup

GATHERED = [(bs, length) for bs in (64, 128, 256, 512) for length in (32_768, 131_072)]
GATHERED_AT_WIDTHS = 512  # requests of bounds.WIDTHS_LENGTH, at each of bounds.WIDTHS
# Requests, length, draft tokens of paged cells that miss their bound by more than what the gather takes.
BARE = ((64, 131_072, 4), (64, 131_072, 8), (128, 131_072, 4), (256, 32_768, 4))
WIDTHS_SECONDS = 2.0
COPY_SECONDS = 0.3
# Requests, length, draft tokens: cells that have missed their share of a copy, and one that has not.
COPIED = (
    *((bs, 32_768, 4) for bs in (128, 256, 512)),
    (64, 131_072, 2),
    (512, 131_072, 8),
    (128, 131_072, 4),
)
CELLS = ((512, 131_072, "paged"), (64, 131_072, "both"), (128, 131_072, "both"))
METRICS = {  # name here: ncu's name
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "sectors_read": "lts__t_sectors_op_read.sum",
    "sectors_written": "lts__t_sectors_op_write.sum",
}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "sector": 1}
TIME_LIMIT_S = 540
# What `sglang-nsa-plugin bench --json` writes and a reader can compute from the rest.
COMPUTED = ("host_over_sglang", "gpu_over_sglang", "copy_share")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = {
        "bench": bench,
        "gather": gather,
        "bare": bare,
        "widths": widths,
        "copies": copies,
        "dram": dram,
    }
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)  # what ncu watches
    arguments = parser.parse_args()
    if arguments.cell:
        requests, length, tables = arguments.cell
        fill_once(int(requests), int(length), tables)
        return 0
    name = f"bench-{result_files.gpu_name()}-{version('sglang')}.json"
    committed = result_files.committed(name)  # before it is overwritten
    for part in arguments.only or parts:
        path = result_files.merge(name, "make bench", {part: parts[part]()})
    return 0 if arguments.only else compared(committed, json.loads(path.read_text()))


def compared(committed: dict[str, Any] | None, new: dict[str, Any]) -> int:
    """Prints what got slower and which goals are missed; 1 where something got slower."""
    run = bounds.measured(new)
    if run["adapter"] != "in-graph":
        print("No goals: this release of SGLang plans draft-extend from Python.")
        return 0
    if committed is None:
        print("\n".join(["No committed run of this GPU to compare with.", *bounds.missed_goals(run)]))
        return 0
    lines, is_slower = bounds.compare(bounds.measured(committed), run)
    print("\n".join([f"Compared with commit {committed['commit'][:7]}:", *lines]))
    return int(is_slower)


def bench() -> dict[str, Any]:
    """``sglang-nsa-plugin bench``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "sglang_nsa_plugin", "bench", "--json", str(path)]
        subprocess.run(command, timeout=TIME_LIMIT_S, check=True)
        found: dict[str, Any] = json.loads(path.read_text())
    found["cases"] = [
        {name: value for name, value in row.items() if name not in COMPUTED} for row in found["cases"]
    ]
    return found


def gather() -> list[dict[str, Any]]:
    """Microseconds by requests, length and the table's width."""
    import torch

    from sglang_nsa_plugin.cli.bench import cases

    width = cases.Setup().width
    cells = [(bs, length, width) for bs, length in GATHERED]
    cells += [(GATHERED_AT_WIDTHS, bounds.WIDTHS_LENGTH, width) for width in bounds.WIDTHS]
    found = []
    for bs, length, width in cells:
        slots = torch.zeros((bs + 1, width), dtype=torch.int32, device="cuda")
        source = slots[1:, : length : cases.PAGE]
        us = copy_us(source, torch.empty(source.shape, dtype=torch.int32, device="cuda"))
        found.append({"requests": bs, "length": length, "width": width, "us": us})
    return found


def bare() -> list[dict[str, Any]]:
    """Microseconds by requests, length and draft tokens, of the quickest size of block."""
    from integration.gpu import gather_floor as kernel
    from sglang_nsa_plugin.cli.bench.cases import PAGE, Setup

    found = []
    for bs, length, draft_tokens in BARE:
        fills = direct_fills(bs, Setup(draft_tokens=draft_tokens))
        slots, table = fills.inputs.req_to_token[1:], fills.real_page_table
        expected = (slots[:, :length:PAGE] // PAGE).repeat_interleave(draft_tokens, dim=0)
        calls = dict(kernel.launches(slots, table, length, draft_tokens, PAGE))
        for name, call in calls.items():
            table.zero_()
            call()
            if not table[:, : expected.shape[1]].equal(expected):
                raise RuntimeError(f"bare kernel with {name}: wrong pages for {bs} requests of {length}")
        us = {name: median_us(call) for name, call in calls.items()}
        block = min(us, key=us.__getitem__)
        cell = {"requests": bs, "length": length, "draft_tokens": draft_tokens}
        found.append({**cell, "us": us[block], "block": block})
    return found


def widths() -> list[dict[str, Any]]:
    """Microseconds of our paged fill by requests and the table's width, each width in every round."""
    from sglang_nsa_plugin.cli.bench import timing
    from sglang_nsa_plugin.cli.bench.cases import PAGED, Case, Setup, write_lengths
    from sglang_nsa_plugin.kernels import cuda

    most = max(bounds.WIDTHS_REQUESTS)
    tables = {width: direct_fills(most, Setup(width=width)) for width in bounds.WIDTHS}
    found = []
    for bs in bounds.WIDTHS_REQUESTS:
        for fills in tables.values():
            write_lengths(fills.inputs, Case(bs, bounds.WIDTHS_LENGTH))
        calls = {str(width): cuda.bind(fills.args(bs, PAGED)) for width, fills in tables.items()}
        times = timing.gpu_times(calls, WIDTHS_SECONDS)
        found += [
            {"requests": bs, "width": int(width), "us": timing.spread(samples)}
            for width, samples in times.items()
        ]
    return found


def direct_fills(requests: int, setup: Setup) -> DirectFills:
    """Fills of up to `requests` requests, over random slots."""
    import torch

    from sglang_nsa_plugin.cli.bench import cases
    from sglang_nsa_plugin.harness.inputs import make_inputs

    device = torch.device("cuda", torch.cuda.current_device())
    inputs = make_inputs(device, requests, requests + 1, setup.width, cases.PAGE)
    cases.write_slots(inputs)
    return cases.DirectFills(inputs, requests, setup.draft_tokens)


def copies() -> list[dict[str, Any]]:
    """A copy's microseconds, and GB/s of the driver's memset, by requests, length and draft tokens."""
    import torch

    from sglang_nsa_plugin.cli.bench import cases

    width = cases.Setup().width
    found = []
    for bs, length, draft_tokens in COPIED:
        slots = torch.zeros((bs + 1, width), dtype=torch.int32, device="cuda")
        table = torch.empty((bs, draft_tokens, width), dtype=torch.int32, device="cuda")
        target = table[:, :, :length]
        us = copy_us(slots[1:, None, :length].expand_as(target), target)
        cell = {"requests": bs, "length": length, "draft_tokens": draft_tokens}
        memset_gb_s = round(4 * bs * length * draft_tokens / memset_us(table, length) / 1000)
        found.append({**cell, "us": us, "memset_gb_s": memset_gb_s})
    return found


def copy_us(source: torch.Tensor, target: torch.Tensor) -> float:
    return median_us(lambda: target.copy_(source))


def memset_us(table: torch.Tensor, length: int) -> float:
    """The driver's time to write the first cells of every row of an int32 table with one number."""
    import torch

    memset = ctypes.CDLL("libcuda.so.1").cuMemsetD2D32Async
    size, number = ctypes.c_size_t, ctypes.c_uint
    memset.argtypes = (ctypes.c_uint64, size, number, size, size, ctypes.c_void_p)
    pitch, rows = table.stride(-2) * table.element_size(), table.numel() // table.shape[-1]

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if error := memset(table.data_ptr(), pitch, 1, length, rows, stream):
            raise RuntimeError(f"cuMemsetD2D32Async returned CUDA error {error}")

    return median_us(call)


def median_us(call: Callable[[], object]) -> float:
    from sglang_nsa_plugin.cli.bench import timing

    return timing.spread(timing.gpu_times({"call": call}, COPY_SECONDS)["call"])["median"]


def dram() -> dict[str, Any]:
    """What ncu counts, with cold caches, for each of CELLS."""
    if shutil.which("ncu") is None:
        return {"reason": "ncu is not on PATH; install Nsight Compute"}
    cells = [{"requests": r, "length": n, "tables": t, **counted(r, n, t)} for r, n, t in CELLS]
    return {"cells": cells}


def counted(requests: int, length: int, tables: str) -> dict[str, Any]:
    from sglang_nsa_plugin.cli.bench.cases import Case, bytes_to_move

    command = [
        "ncu", "--csv", "--metrics", ",".join(METRICS.values()), "--kernel-name", "regex:fill_static",
        "--launch-count", "1", "--clock-control", "none", "--cache-control", "all",
        sys.executable, "-m", "integration.gpu.bench", "--cell", str(requests), str(length), tables,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)
    table = "\n".join(line for line in run.stdout.splitlines() if line.startswith('"'))
    values = {row["Metric Name"]: row for row in csv.DictReader(io.StringIO(table))}
    found = {
        name: round(
            float(values[metric]["Metric Value"].replace(",", "")) * UNITS[values[metric]["Metric Unit"]]
        )
        for name, metric in METRICS.items()
    }
    return {"must_move": bytes_to_move(Case(requests, length), 4, tables), "counted": found}


def fill_once(requests: int, length: int, tables: str) -> None:
    """One fill by the CUDA kernel and no other kernel of the plugin."""
    import torch

    from sglang_nsa_plugin.cli.bench import cases
    from sglang_nsa_plugin.kernels import cuda

    fills = direct_fills(requests, cases.Setup())
    cases.write_lengths(fills.inputs, cases.Case(requests, length))
    cuda.bind(fills.args(requests, tables))()
    torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
