"""Runs mutmut over modules whose mistakes would reach a server, with the tests that concern each.

``python tests/mutation/python_mutants.py [--sample N] [MODULE ...]`` takes names of MODULES below, or
runs all of them; with a sample, N mutants of each module, the same ones every time. mutmut works in a
copy of the repository. Prints every mutant that survived, with its change; README.md beside this file
says which ones are expected. The exit code is that of mutmut.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "docs", "integration", "sglang_nsa_plugin", "tests")
IN_GRAPH = (
    "test_in_graph.py",
    "test_shadow_check.py",
    "test_declined.py",
    "test_runner.py",
    "test_wide_table.py",
)
ADAPTERS = tuple(f"tests/adapters/{name}" for name in IN_GRAPH)
MODULES = {
    "fill_args": ("tests/test_fill_args.py", "tests/test_values.py::test_schedules_of_extreme_lengths"),
    "dispatch": ("tests/test_dispatch.py", "tests/test_api.py"),
    "self_test": ("tests/test_dispatch.py",),
    "adapters/captured_fill": ADAPTERS,
    "adapters/fallbacks": ("tests/adapters/test_fallbacks.py",),
    "adapters/hooks": ("tests/adapters/test_hooks.py", "tests/adapters/test_faults.py"),
    "adapters/in_graph": ADAPTERS,
    "adapters/install": ADAPTERS,
    "adapters/outcome": ("tests/adapters/test_outcome.py",),
    "adapters/shadow_check": ADAPTERS,
}
# Not in pytest's own process, or about the tree that the tests lie in; Triton's interpreter is slow.
DESELECTED = "not triton and not installed and not fresh"
CONFIG = """
[mutmut]
source_paths = sglang_nsa_plugin
only_mutate =
    {module}
also_copy =
    {copied}
pytest_add_cli_args =
    -q
    -k
    {deselected}
pytest_add_cli_args_test_selection =
    {tests}
process_isolation = forkserver
"""


def run(folder: Path, module: str, sample: int | None) -> int:
    """mutmut over one module, in a copy of the repository."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    settings = {
        "module": f"sglang_nsa_plugin/{module}.py",
        "copied": "\n    ".join(COPIED),
        "deselected": DESELECTED,
        "tests": "\n    ".join(MODULES[module]),
    }
    (folder / "setup.cfg").write_text(CONFIG.format(**settings))
    names = [] if sample is None else sampled(folder, module, sample)
    children = max(1, len(os.sched_getaffinity(0)) // 2)
    done = mutmut(folder, "run", "--max-children", str(children), *names)
    if done.returncode != 0:
        print(done.stdout[-3_000:], done.stderr[-3_000:], sep="\n", file=sys.stderr)
        return done.returncode
    counts = re.findall(r"\d+/\d+[^\r\n]*", done.stdout)[-1]
    print(f"{module}: {' '.join(counts.split())}", flush=True)
    for line in mutmut(folder, "results").stdout.splitlines():
        name, _, outcome = line.strip().partition(": ")
        if outcome == "not checked":
            continue
        changed = re.findall(r"^[-+](?![-+]).*", mutmut(folder, "show", name).stdout, re.MULTILINE)
        print(f"{name}: {outcome}", *changed, sep="\n  ", flush=True)
    return 0


def sampled(folder: Path, module: str, count: int) -> list[str]:
    """Names of ``count`` mutants, drawn with seed 0 after mutmut has written them all."""
    mutmut(folder, "run", "a name that no mutant has")
    written = folder / "mutants" / "sglang_nsa_plugin" / f"{module}.py.meta"
    names = sorted(json.loads(written.read_text())["exit_code_by_key"])
    return random.Random(0).sample(names, min(count, len(names)))


def mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of mutmut."""
    return subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> int:
    """Runs the modules that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="run N mutants of each module")
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], metavar="MODULE")
    arguments = parser.parse_args()
    code = 0
    for module in arguments.modules or MODULES:
        with tempfile.TemporaryDirectory() as folder:
            code = run(Path(folder), module, arguments.sample) or code
    return code


if __name__ == "__main__":
    raise SystemExit(main())
