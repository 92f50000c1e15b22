"""Builds of the kernel side by side on one GPU, in one run: values compared, then timed in turn.

    cmake -S csrc -B build/old && cmake --build build/old    # csrc/ as it was; then build/new as it is
    python -m integration.gpu.ab_kernels build/{old,new}/nsa_metadata.so [--json FILE]

For docs/kernel.md: what is kept of a version is measured by `make bench`. Needs an NVIDIA GPU and the
installed package, whose Python binds every build; no SGLang.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tvm_ffi

from sglang_nsa_plugin.cli.bench import cases, paths, timing
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.harness.inputs import make_inputs
from sglang_nsa_plugin.kernels import compiled, cuda
from sglang_nsa_plugin.kernels import torch as reference

BOTH, PAGED = cases.BOTH, cases.PAGED
# Width and draft tokens: requests, length and tables of the cells.
CELLS: dict[tuple[int, int], list[tuple[int, int, str]]] = {
    (163_904, 4): [
        *((bs, length, BOTH) for bs in (1, 2, 3, 8, 64) for length in (2_048, 32_768, 131_072)),
        *((bs, length, PAGED) for bs in (1, 8, 64, 128) for length in (2_048, 32_768, 131_072)),
        *((bs, 32_768, BOTH) for bs in (128, 256, 512)),
        *((bs, 131_072, BOTH) for bs in (16, 32, 128)),
        *((bs, 32_768, PAGED) for bs in (256, 512)),
        *((bs, 131_072, PAGED) for bs in (256, 512)),
    ],
    (163_904, 2): [(64, 131_072, BOTH), (64, 131_072, PAGED)],
    (163_904, 8): [
        (1, 2_048, BOTH),
        (1, 131_072, BOTH),
        (8, 131_072, BOTH),
        (8, 131_072, PAGED),
        (64, 131_072, PAGED),
        (512, 2_048, PAGED),
    ],
    (4_096, 4): [(bs, 2_048, tables) for bs in (1, 8, 64, 512) for tables in (BOTH, PAGED)],
    (1_048_640, 4): [(bs, 2_048, PAGED) for bs in (1, 8, 64)],
}
SECONDS = 0.25  # of each cell
OTHER_BYTES = 1 << 27  # more than L2 holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="+", type=Path, metavar="LIBRARY")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("ab_kernels: needs an NVIDIA GPU, torch finds none", file=sys.stderr)
        return 1
    rows = []
    for row in measured({str(path): tvm_ffi.load_module(str(path)) for path in arguments.builds}):
        print(row, flush=True)
        rows.append(row)
    if arguments.json:
        found = {"gpu": torch.cuda.get_device_name(), "unit": "µs", "cells": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measured(builds: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each cell: GPU microseconds of every build.

    Between two builds L2 is filled with other data, so that no build finds what another has read.

    Raises:
        DifferentValuesError: a build wrote another value than the reference; names both.
    """
    for (width, draft_tokens), cells in CELLS.items():
        most = max(bs for bs, *_ in cells)
        inputs = make_inputs(torch.device("cuda", 0), most, most + 1, width, cases.PAGE)
        cases.write_slots(inputs)
        fills = cases.DirectFills(inputs, most, draft_tokens)
        for bs, length, tables in cells:
            case = cases.Case(bs, length)
            cases.write_lengths(inputs, case)
            args = fills.args(bs, tables)
            calls = {name: bound(build, args) for name, build in builds.items()}
            reference.bind(args)()
            expected = {name: tensor.clone() for name, tensor in args.outputs().items()}
            paths.compare(calls, args, expected)
            times = timing.gpu_times(with_others_between(calls), SECONDS)
            cell = {"width": width, "draft_tokens": draft_tokens, "requests": bs, "length": length}
            us = {name: timing.spread(times[name]) for name in calls}
            yield {**cell, "tables": tables, "us": us}


def with_others_between(calls: Mapping[str, timing.Call]) -> dict[str, timing.Call]:
    other = torch.zeros(OTHER_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [{name: call, f"after {name}": other.zero_} for name, call in calls.items()]
    return {name: call for pair in pairs for name, call in pair.items()}


def bound(build: Any, args: FillArgs) -> timing.Call:
    """The fill by this build instead of the package's own."""
    with mock.patch.object(compiled, "binder", return_value=compiled.Binder(build)):
        return cuda.bind(args)


if __name__ == "__main__":
    raise SystemExit(main())
