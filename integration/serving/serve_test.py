"""``make serve-test``: real servers with and without the plugin, in slices of 9 minutes or less.

    python -m integration.serving.serve_test [SLICE ...] [-- PYTEST OPTIONS]

Without a slice all of them run, one after the other. Each writes its figures into
integration/results/serve-VERSION.json, or below NSA_RESULTS_DIR, beside those of the same commit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Files of each slice, and options of pytest.
SLICES: dict[str, tuple[str, ...]] = {
    "core": ("test_serving.py",),
    "replay": ("test_replay.py", "--servers=3"),
    "cases": ("test_cases.py",),
    "fp8": ("test_fp8.py",),
    "corruption": ("test_corruption.py", "--servers=4"),
    "dropped": ("test_dropped.py", "--servers=8"),
    "roles": ("test_roles.py", "--servers=6"),
    "decode": ("test_decode.py", "--servers=6"),
    "kpool": ("test_kpool.py", "--servers=4"),
    "profile": ("test_profile.py",),
    "tables": ("test_tables.py",),
    "widths": ("test_widths.py", "--servers=6"),
    "eager": ("test_eager.py", "--servers=4"),
    "memory": ("test_memory.py",),
    "other-plugin": ("test_other_plugin.py",),
    "memory-graphs": ("test_memory_graphs.py", "--servers=4"),
    "sampling": ("test_sampling.py", "--servers=3"),
    "shadow": ("test_shadow_serving.py",),
    "shadow-load": ("test_shadow_load.py",),
    "load": ("test_load.py", "-k", "not checked and not drafts"),
    "load-checked": ("test_load.py", "-k", "checked"),
    "load-6-drafts": ("test_load.py", "-k", "drafts", "--load-s=180"),
    # Of eight servers the one of two layers; a later -k of the caller's chooses another.
    "gain": ("test_gain.py", "-k", "2-layers-160k-bf16 and not 256"),
    "first-minute": ("test_first_minute.py",),
    "switch": ("test_switch.py",),
    "parallel": ("test_parallel.py", "--servers=4"),
}
# Flags and requests: no timing, no long load, no server that ends. Its servers start side by side.
MOST = ("cases", "fp8", "widths", "eager", "sampling")
SLICES["most"] = (*(SLICES[name][0] for name in MOST), "--servers=8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=f"of {', '.join(SLICES)}")
    ours, pytest_options = _split(sys.argv[1:])
    names = parser.parse_args(ours).slices or [name for name in SLICES if name != "most"]
    unknown = [name for name in names if name not in SLICES]
    if unknown:
        parser.error(f"no slice named {', '.join(unknown)}; there are {', '.join(SLICES)}")
    failed = [name for name in names if not run(name, pytest_options)]
    print("FAILED: " + ", ".join(failed) if failed else "serve-test passed: " + ", ".join(names))
    return 1 if failed else 0


def run(name: str, pytest_options: list[str]) -> bool:
    """One slice in a pytest of its own; True when it passed or had nothing to run here."""
    begin = time.monotonic()
    files = [str(FOLDER / each) if each.endswith(".py") else each for each in SLICES[name]]
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider"]
    code = subprocess.run(
        [*command, *files, *pytest_options], cwd=FOLDER.parent.parent, check=False
    ).returncode
    print(f"slice {name}: {time.monotonic() - begin:.0f} s, pytest's exit code {code}", flush=True)
    return code == 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--`` and those after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    raise SystemExit(main())
