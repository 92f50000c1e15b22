"""What the documents promise is there: figures from result files, versions that agree, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_readme_figures_are_those_of_the_result_files() -> None:
    command = [sys.executable, "integration/readme.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert newest is not None
    assert project is not None
    assert newest[1] == project[1] == version("sglang-nsa-plugin")


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "gpu-test", "serve-test"} <= named
    assert named <= targets


@pytest.mark.parametrize("name", ["gpu-test-0.5.17.json", "serve-0.5.17.json"])
def test_result_files_name_their_origin(name: str) -> None:
    text = (ROOT / "integration" / "results" / name).read_text()
    for key in ("date", "commit", "gpus", "versions", "command"):
        assert f'"{key}"' in text


# What runs each command of the documents, or why nothing does.
RUN_BY = {
    "pip install sglang-nsa-plugin": "test_wheel.py installs the wheel; no index has the package yet",
    "pip install .": "test_wheel.py",
    "NSA_CUDA=ON pip install .": "test_build.py",
    "NSA_CUDA=OFF pip install .": "test_wheel.py",
    "sglang-nsa-plugin verify": "test_verify.py",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make demo": ".ci/run",
    "make test-release": ".ci/run",
    "make test-releases": "make test-release for each release, hours on a small machine",
    "make gpu-test": "needs a GPU",
    "make serve-test": "needs a GPU",
    "make bench": "needs a GPU",
    "make wheel": "test_wheel.py builds the same way, for the time it takes",
    "integration/gpu_host.sh": "needs a GPU host",
    "python3 integration/readme.py": "test_repository.py, with --check",
    "python3 integration/plot.py": "needs matplotlib, which nothing else here does",
}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_command_of_the_documents_is_accounted_for(document: str) -> None:
    text = (ROOT / document).read_text()
    written = re.findall(
        r"^    (?!sglang-nsa-plugin \d)((?:\w+=\S+ )*(?:pip|make|sglang-nsa-plugin) .*)", text, re.M
    )
    written += re.findall(r"`((?:make|python3) [^`]+)`", text)
    commands = [re.split(r"\s{2,}#|\s{3,}", line)[0].strip() for line in written]
    assert commands
    assert [
        c for c in commands if not any(c == known or c.startswith(f"{known} ") for known in RUN_BY)
    ] == []


def test_what_runs_the_commands_is_there() -> None:
    for command, by in RUN_BY.items():
        if by.startswith("test_"):
            assert (ROOT / "tests" / by.split()[0].rstrip(",")).is_file(), command
        if by == ".ci/run":
            assert f"\n{command}" in (ROOT / ".ci" / "run").read_text(), command


def test_files_of_the_readme_exist() -> None:
    paths = set(
        re.findall(
            r"`((?:sglang_nsa_plugin|integration|tests|csrc)/[\w./-]*)`",
            (ROOT / "README.md").read_text(),
        )
    )
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_tests_named_in_the_table_of_known_failures_exist() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    named = set(re.findall(r"`([\w/.]+\.py)::(\w+)`", text))
    assert len(named) > 50
    missing = []
    for file, test in sorted(named):
        path = ROOT / (file if file.startswith("integration/") else f"tests/{file}")
        if not path.is_file() or f"\ndef {test}(" not in path.read_text():
            missing.append(f"{file}::{test}")
    assert missing == []


def test_every_row_of_readmes_fault_table_names_its_tests() -> None:
    rows = _rows("README.md", "## When something is not as expected")
    shown = _rows("tests/README.md", "## README's table of what is not as expected")
    assert len(rows) > 10
    assert [situation for situation, _ in shown] == [situation for situation, _ in rows]
    assert [situation for situation, tests in shown if not re.search(r"`[\w/]+\.py::\w+`", tests)] == []


def _rows(document: str, heading: str) -> list[tuple[str, str]]:
    """The rows of the table of two columns under a heading, without its head."""
    section = (ROOT / document).read_text().partition(heading)[2].partition("\n## ")[0]
    rows = [(row[0], row[1]) for row in re.findall(r"^\| (.+?) \| (.+) \|$", section, re.M)]
    return rows[1:]


def test_every_known_failure_has_its_line() -> None:
    lines = re.findall(r"^\| ([FP]\d+) \| .+ \| .+ \|$", (ROOT / "tests/README.md").read_text(), re.M)
    assert lines == [*(f"F{n}" for n in range(1, 35)), *(f"P{n}" for n in range(1, 9))]


def test_test_files_are_described() -> None:
    described = (ROOT / "tests" / "README.md").read_text().partition("## Known failures")[0]
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert files == set(re.findall(r"`(test_\w+\.py)`", described))
