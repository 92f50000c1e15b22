"""Result files: every figure with the machine, the versions, the date and the commit it came from.

They hold what was measured; whoever shows ratios and shares computes them. A newer run on the same GPU
replaces an older one. One row is one line, so that a diff shows the rows that changed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINE = 140  # characters; what fits is one line
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
    path.write_text(as_text({**header, "parts": merged}) + "\n")
    return path


def as_text(value: Any, indent: int = 0) -> str:
    """JSON: a line for each entry of a mapping and each element of a list, or one for all if it fits."""
    line = json.dumps(value)
    inner = " " * (indent + 1)
    if indent + len(line) <= LINE or not isinstance(value, (dict, list)):
        return line
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + json.dumps(row) for row in value) + f"\n{' ' * indent}]"
    entries = (f"{inner}{json.dumps(key)}: {as_text(each, indent + 1)}" for key, each in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{' ' * indent}}}"


def without_repeats(value: Any) -> Any:
    """Roles in a plugin's record keep what differs from the record itself; `all_of_role` reads them."""
    if isinstance(value, list):
        return [without_repeats(each) for each in value]
    if not isinstance(value, dict):
        return value
    short = {key: without_repeats(each) for key, each in value.items()}
    if "replays" in value and isinstance(value.get("roles"), dict):
        short["roles"] = {
            role: {key: each for key, each in found.items() if key not in value or value[key] != each}
            for role, found in value["roles"].items()
        }
    return short


def all_of_role(record: dict[str, Any], role: str) -> dict[str, Any]:
    """A role's part of a record that `without_repeats` has made short, whole again."""
    whole = {key: each for key, each in record.items() if key != "roles"}
    return {**whole, **record["roles"][role]}


def committed(name: str) -> dict[str, Any] | None:
    """A result file as committed, or as in the tree where there is no git; None if there is none."""
    path = f"integration/results/{name}"
    if shutil.which("git"):
        command = ["git", "show", f"HEAD:{path}"]
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if git.returncode == 0:
            return dict(json.loads(git.stdout))
    return dict(json.loads((ROOT / path).read_text())) if (ROOT / path).is_file() else None


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
    head = _git("rev-parse", "HEAD")
    # A run of several parts writes results while it goes on: these do not make the tree another.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!integration/results")
    return f"{head}-dirty" if changed else head or "unknown"


def _git(*arguments: str) -> str:
    git = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip()


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


def gpu_name() -> str:
    """The first GPU as file names have it: 'NVIDIA H200' → 'h200'.

    Raises:
        RuntimeError: nvidia-smi lists no GPU.
    """
    names = of_gpus("name")
    if not names:
        raise RuntimeError("result files are named after the GPU, and nvidia-smi lists none")
    return names[0].lower().removeprefix("nvidia ").replace(" ", "-")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
