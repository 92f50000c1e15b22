"""compute-sanitizer's four tools over the GPU tests and over one fill of each kind; for gpu_test.py.

All tools run at once, each over several processes: a GPU host has cores and memory for that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration import result_files

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The plugin's, in CUDA and in Triton: torch's and SGLang's kernels run at full speed.
KERNELS = (
    "fill_static_kernel",
    "fill_ragged_kernel",
    "fill_kpool_kernel",
    "fill_kernel",
    "compare_kernel",
    "conclude_kernel",
    "no_op_kernel",
)
# A value that an unwatched kernel wrote would count as never written: this one watches all of them.
UNFILTERED = "initcheck"
# What tests/memcpy_trace.py prints of a copy, and what the tool does.
TRACED_COPY = re.compile(r"copy of (?P<address>0x[0-9a-f]+), (?P<bytes>\d+) bytes, for (?P<asker>\S+)")
READ_BY_COPY = re.compile(r"Uninitialized access to (?P<address>0x[0-9a-f]+) on access by cudaMemcpy")
TracedCopies = dict[tuple[int, int], str]  # address and bytes → who asked
UNKNOWN = "unknown"
SGLANG = "sglang."
SHOWN = 5  # of the copies that nothing explains
TIME_LIMIT_S = 480
FUZZ = "tests/test_fuzz.py"
KPOOL_FUZZ = "tests/test_kpool.py::test_any_batch"
IN_GRAPH = "tests/gpu/test_gpu_in_graph.py"
SHARDS = (
    (IN_GRAPH,),
    ("tests/gpu", f"--ignore={IN_GRAPH}"),
    ("tests/test_values.py",),
    (FUZZ, "-k", "any_batch"),
    (FUZZ, "-k", "not any_batch"),
    (
        "tests",
        *(f"--ignore={path}" for path in ("tests/gpu", "tests/tools", "tests/test_values.py", FUZZ)),
    ),
)
VAST_SHARDS = (("tests/test_values.py", FUZZ),)  # of tests that hold 17 GB each: one process a tool
VAST_TOOLS = tuple(tool for tool in TOOLS if tool != "initcheck")  # which they skip
FUZZ_BATCHES = 100
FILLS = "tests/gpu/sanitized_fill.py"
PLANTED = ("memcheck", "initcheck")  # the tools that find what FILLS --planted does wrong
# Each tensor is an allocation of its own: a read past its end is found, and one of freed memory.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MISSING = {"passed": False, "reason": "compute-sanitizer is not on PATH; install the CUDA toolkit"}


def sanitize_fills() -> dict[str, Any]:
    """One fill of each kind under each tool; and what was done wrong on purpose is found."""
    if shutil.which("compute-sanitizer") is None:
        return MISSING
    planted = tuple(f"planted, {tool}" for tool in PLANTED)
    calls = [(tool, [FILLS]) for tool in TOOLS] + [(tool, [FILLS, "--planted"]) for tool in PLANTED]
    runs = dict(zip(TOOLS + planted, _run_side_by_side(calls, UNCACHED), strict=True))
    for run in runs.values():
        fills = re.search(r"sanitized fills: (\d+)", run.pop("output"))
        run["fills"] = int(fills[1]) if fills else 0
    clean = all(runs[tool]["exit_code"] == 0 and runs[tool]["errors"] == 0 for tool in TOOLS)
    found = {tool: runs.pop(f"planted, {tool}")["errors"] for tool in PLANTED}
    return {"passed": clean and all(found.values()), **runs, "planted": found}


def sanitize_tests() -> dict[str, Any]:
    """The GPU tests under each tool, but those that say why they cannot run there."""
    return _tests_under_each(TOOLS, "gpu and not vast", SHARDS)


def sanitize_vast_tests() -> dict[str, Any]:
    """Those that hold 17 GB each: apart, for three of them side by side leave room for little else."""
    return _tests_under_each(VAST_TOOLS, "gpu and vast", VAST_SHARDS)


def _tests_under_each(
    tools: Sequence[str], marked: str, shards: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    if shutil.which("compute-sanitizer") is None:
        return MISSING
    calls = [(tool, _tests(tool, marked, *shard)) for tool in tools for shard in shards]
    runs = list(zip(calls, _run_side_by_side(calls, {}), strict=True))
    found = {tool: _sum([run for (by, _), run in runs if by == tool]) for tool in tools}
    return {"passed": all(tool["passed"] for tool in found.values()), **found}


def _tests(tool: str, marked: str, *files: str) -> list[str]:
    """Arguments for Python: the tests of these files; their output and the tool's are mixed."""
    options = f"-q -s -p no:cacheprovider --sanitized {tool} --fuzz-batches {FUZZ_BATCHES}"
    return ["-m", "pytest", "-m", marked, *options.split(), *files]


def _run_side_by_side(
    calls: Sequence[tuple[str, list[str]]], environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: _run(call[0], call[1], environment), calls))


def _sum(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One tool's result: that of its processes together."""
    output = "".join(run["output"] for run in runs)
    counts = result_files.counts_of_tests(output)
    errors = [run["errors"] for run in runs]
    return {
        "passed": all(run["exit_code"] == 0 and run["errors"] == 0 for run in runs)
        and "passed" in counts,
        "errors": None if None in errors else sum(errors),
        "copies_of_sglang": sum(run["copies_of_sglang"] for run in runs),
        "found_elsewhere": sorted({name for run in runs for name in run["found_elsewhere"]}),
        "copies": dict(sum((run["copies"] for run in runs), Counter[str]()).most_common()),
        "tests": counts,
        "failed": result_files.failed_tests(output),
        "left_out": _left_out(output),
        "exit_codes": [run["exit_code"] for run in runs],
        "seconds": max(run["seconds"] for run in runs),
    }


def _left_out(output: str) -> dict[str, int]:
    """Reason → tests, of those that were left out for the tools' sake."""
    skipped = re.findall(
        r"^SKIPPED \[(\d+)\] .*not under compute-sanitizer: (.+)$", output, re.MULTILINE
    )
    reasons = Counter[str]()
    for count, reason in skipped:
        reasons[reason] += int(count)
    return dict(reasons)


def _run(tool: str, arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    begin = time.monotonic()
    # timeout(1) ends the whole process group: the tool's child would stay on the GPU
    command = ["timeout", "--kill-after=10", str(TIME_LIMIT_S), *_tool(tool), sys.executable, *arguments]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(
        f"--- {tool}, {' '.join(arguments)}: exit code {run.returncode}\n{run.stdout[-1500:]}",
        flush=True,
    )
    reads = list(reads_by_copies(run.stdout))
    for asker, words in [read for read in reads if not read[0].startswith(SGLANG)][:SHOWN]:
        print(f"asked for by {asker}:\n{words}", flush=True)
    copies = Counter(asker for asker, _ in reads)
    errors, of_sglang = findings(tool, run.stdout, copies)
    return {
        "errors": errors,
        "copies_of_sglang": of_sglang,
        "found_elsewhere": found_elsewhere(run.stdout),
        "copies": copies,
        "exit_code": run.returncode,
        "seconds": round(time.monotonic() - begin, 1),
        "output": run.stdout,
    }


def _tool(name: str) -> list[str]:
    # An error that a call returns is no finding: libraries try calls, and the plugin checks its own.
    options = ["--report-api-errors", "no", "--show-backtrace", "no", "--print-limit", "100000"]
    if name != UNFILTERED:
        by_name = _option_of_kernels()
        options += [part for kernel in KERNELS for part in (by_name, f"kernel_substring={kernel}")]
    return ["compute-sanitizer", "--tool", name, *options]


def _option_of_kernels() -> str:
    """The option was renamed once."""
    usage = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, check=False)
    return "--kernel-name" if "--kernel-name " in usage.stdout + usage.stderr else "--kernel-regex"


def findings(tool: str, output: str, copies: Mapping[str, int]) -> tuple[int | None, int]:
    """Errors, None where the tool did not end by itself; and those copies that SGLang asked for."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if summary is None:
        return None, 0
    allowed = sum(count for asker, count in copies.items() if asker.startswith(SGLANG))
    of_sglang = allowed if tool == UNFILTERED else 0
    return int(summary[1]) - of_sglang, of_sglang


def reads_by_copies(output: str) -> Iterator[tuple[str, str]]:
    """Copies of what was never written: who asked, by tests/memcpy_trace.py, and the tool's words."""
    traced: TracedCopies = {}
    before = ""
    for line in output.splitlines():
        if copy := TRACED_COPY.search(line):
            place = int(copy["address"], 16), int(copy["bytes"])
            traced.pop(place, None)  # the newest are last
            traced[place] = copy["asker"]
        elif read := READ_BY_COPY.search(line):
            yield _asker(traced, int(read["address"], 16)), f"{before}\n{line}"
        else:
            before = line


def _asker(traced: TracedCopies, address: int) -> str:
    newest_first = reversed(traced.items())
    return next((by for (at, size), by in newest_first if at <= address < at + size), UNKNOWN)


def found_elsewhere(output: str) -> list[str]:
    """What has findings but our kernels: others, without template arguments, and copies."""
    lines = re.findall(r"^=+ +at (.*)", output.replace("(anonymous namespace)::", ""), re.MULTILINE)
    names = {re.split(r"[<(+]", line.removeprefix("void "), maxsplit=1)[0] for line in lines}
    copies = re.findall(r"^=+ .*on access by (.+)", output, re.MULTILINE)
    return sorted(
        {name for name in names if not any(kernel in name for kernel in KERNELS)} | set(copies)
    )


def parts() -> dict[str, Callable[[], dict[str, Any]]]:
    """What gpu_test.py runs, by name."""
    return {
        "sanitizers": sanitize_fills,
        "sanitized_tests": sanitize_tests,
        "sanitized_vast_tests": sanitize_vast_tests,
    }
