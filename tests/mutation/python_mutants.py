"""Runs mutmut over modules whose mistakes would reach a server, with the tests that concern each.

``python tests/mutation/python_mutants.py [MODULE ...]``, of MODULES below; without one, all of them. mutmut
works in a copy of the repository. Prints every mutant that survived, with what it changed; README.md beside
this file says which ones are expected. The exit code is that of mutmut.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "docs", "integration", "sglang_nsa_plugin", "tests")
IN_GRAPH = ("test_in_graph.py", "test_shadow_check.py", "test_declined.py", "test_runner.py", "test_wide_table.py")
ADAPTERS = tuple(f"tests/adapters/{name}" for name in IN_GRAPH)
MODULES = {
    "fill_args": ("tests/test_fill_args.py", "tests/test_values.py"),
    "dispatch": ("tests/test_dispatch.py", "tests/test_api.py"),
    "self_test": ("tests/test_dispatch.py",),
    "adapters/captured_fill": ADAPTERS,
    "adapters/fallbacks": ADAPTERS,
    "adapters/hooks": ADAPTERS,
    "adapters/in_graph": ADAPTERS,
    "adapters/install": ADAPTERS,
    "adapters/outcome": ADAPTERS,
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


def run(folder: Path, module: str) -> int:
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
    done = mutmut(folder, "run", "--max-children", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    if done.returncode != 0:
        print(done.stdout[-3_000:], done.stderr[-3_000:], sep="\n", file=sys.stderr)
        return done.returncode
    counts = re.findall(r"\d+/\d+[^\r\n]*", done.stdout)[-1]
    print(f"{module}: {' '.join(counts.split())}", flush=True)
    for line in mutmut(folder, "results").stdout.splitlines():
        name, _, outcome = line.strip().partition(": ")
        changed = re.findall(r"^[-+](?![-+]).*", mutmut(folder, "show", name).stdout, re.MULTILINE)
        print(f"{name}: {outcome}", *changed, sep="\n  ", flush=True)
    return 0


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


def main(modules: list[str]) -> int:
    """Runs the modules of these names, or all of them."""
    unknown = set(modules) - set(MODULES)
    if unknown:
        raise SystemExit(f"must be of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    code = 0
    for module in modules or MODULES:
        with tempfile.TemporaryDirectory() as folder:
            code = run(Path(folder), module) or code
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
