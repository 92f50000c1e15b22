"""Result files: every figure with the machine, the versions, the date and the commit it came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAMP = ("date", "commit", "gpus")  # the header of a file is that of its last run
DISTRIBUTIONS = (
    "torch",
    "triton",
    "sglang",
    "sglang-nsa-plugin",
    "apache-tvm-ffi",
    "sgl-deep-gemm",
)


def folder() -> Path:
    """``integration/results``, or where NSA_RESULTS_DIR says."""
    path = Path(os.environ.get("NSA_RESULTS_DIR") or ROOT / "integration" / "results")
    path.mkdir(parents=True, exist_ok=True)
    return path


def merge(name: str, command: str, parts: dict[str, Any], *, alone: bool = False) -> Path:
    """Writes ``parts`` into a result file, keeping the parts of earlier runs of the same commit.

    Args:
        name: of the file.
        command: that writes it.
        parts: figures by their name; those of the same name are replaced.
        alone: each part stands on its own and says which run it is of; those of other commits stay, too.
    """
    path = folder() / name
    header = {"command": command, **environment()}
    old = json.loads(path.read_text()) if path.is_file() else {}
    if alone:
        merged = {**_stamped(old.get("parts", {}), old), **_stamped(parts, header)}
    else:
        merged = {**(old.get("parts", {}) if old.get("commit") == header["commit"] else {}), **parts}
    path.write_text(json.dumps({**header, "parts": merged}, indent=2) + "\n")
    return path


def _stamped(parts: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The parts with the run that they are of, where they do not say it yet."""
    return {name: {"of": {key: run[key] for key in STAMP}, **part} for name, part in parts.items()}


def counts_of_tests(output: str) -> dict[str, int]:
    """How many tests pytest's closing line, or those of several runs together, say passed and so on."""
    counts: Counter[str] = Counter()
    for line in re.findall(
        r"^.*\b(?:passed|failed|errors?|skipped)\b.* in [\d.]+s.*$", output, re.MULTILINE
    ):
        for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", line):
            counts[word] += int(count)
    return dict(counts)


def failed_tests(output: str) -> list[str]:
    """The tests that pytest names at its end."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)


def environment() -> dict[str, Any]:
    """Date, commit, GPU, driver and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpus": of_gpus("name,driver_version"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
    }


def commit() -> str:
    """NSA_COMMIT, for hosts that have the files without the repository, else git's HEAD."""
    named = os.environ.get("NSA_COMMIT")
    if named:
        return named
    git = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "unknown"


def of_gpus(query: str) -> list[str]:
    """What nvidia-smi says of each GPU that CUDA_VISIBLE_DEVICES leaves; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":  # hides all
        return []
    if visible is not None:
        command += ["--id", visible]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return []
    return output.strip().splitlines()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
