"""``make gpu-test``: the GPU tests, the sanitizers and the demo, into one committed result file.

    python -m integration.gpu.gpu_test [--only PART ...]    # --help names the parts

Needs an NVIDIA GPU, torch, pytest, hypothesis and the installed package; SGLang, whichever release is
installed, for the adapter tests and the demo; compute-sanitizer for the sanitizers. Writes
integration/results/gpu-test-VERSION.json, named after that release, or below NSA_RESULTS_DIR.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from integration import result_files
from integration.gpu import sanitizers

ROOT = Path(__file__).resolve().parent.parent.parent
TIMING = "tests/gpu/test_gpu_bench.py"
APART = ("tests/tools", sanitizers.FUZZ, TIMING)
TIME_LIMIT_S = 540
SOAKS = {"soak": "draft-extend", "soak_verify": "verify", "soak_draft_decode": "draft-decode"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: run_tests(
            "tests", *(f"--ignore={path}" for path in APART), f"--deselect={sanitizers.KPOOL_FUZZ}"
        ),
        "timing": lambda: run_tests(TIMING),  # with the GPU to itself
        "fuzz": lambda: run_tests(sanitizers.FUZZ, sanitizers.KPOOL_FUZZ),
        "adapters": lambda: run_tests("tests/gpu/test_gpu_in_graph.py", "tests/gpu/test_gpu_eager.py"),
        **sanitizers.parts(),
        "demo": run_demo,
        **{part: partial(run_module, "soak", "--role", role) for part, role in SOAKS.items()},
        "check_cost": lambda: run_module("check_cost"),  # with the GPU to itself
        "sglang_kit": lambda: run_module("sglang_kit"),  # of 0.5.20 and later
    }
    parser.add_argument("--only", choices=parts, action="append")
    # tests has those of adapters, too; timing and check_cost need the GPU alone; the others take minutes
    by_name = (
        "adapters",
        "timing",
        "fuzz",
        "sanitized_tests",
        "sanitized_vast_tests",
        *SOAKS,
        "check_cost",
        "sglang_kit",
    )
    only = parser.parse_args().only or [name for name in parts if name not in by_name]
    outcome: dict[str, Any] = {}
    for name in only:
        outcome[name] = parts[name]()
        result_files.merge(
            f"gpu-test-{version('sglang')}.json", "make gpu-test", {name: outcome[name]}, alone=True
        )
    failed = [name for name, part in outcome.items() if not part["passed"]]
    print("FAILED: " + ", ".join(failed) if failed else "gpu-test passed: " + ", ".join(outcome))
    return 1 if failed else 0


def run_tests(*arguments: str) -> dict[str, Any]:
    """Pytest over what is marked gpu; counts come from its closing line."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *arguments]
    output = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:  # shown as it comes: a run that is ended half-way has said what it did
            print(line, end="", flush=True)
            output += line
    return {
        "passed": run.returncode == 0,
        "counts": result_files.counts_of_tests(output),
        "failed": result_files.failed_tests(output),
        "seconds": round(time.monotonic() - begin, 1),
    }


def run_demo() -> dict[str, Any]:
    """``sglang-nsa-plugin demo``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "sglang_nsa_plugin", "demo", "--json", str(path)]
        run = subprocess.run(command, timeout=TIME_LIMIT_S, check=False)
        found = json.loads(path.read_text()) if path.is_file() else {}
        return {"passed": run.returncode == 0, **found}


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """What a module of this package writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"integration.gpu.{name}", *arguments, "--json", str(path)]
        subprocess.run(command, cwd=ROOT, timeout=TIME_LIMIT_S, check=False)
        return json.loads(path.read_text()) if path.is_file() else {"passed": False}


if __name__ == "__main__":
    raise SystemExit(main())
