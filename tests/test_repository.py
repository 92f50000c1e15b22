"""What the documents promise is there: figures from result files, versions that agree, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import needs_sglang

from sglang_nsa_plugin import metrics

ROOT = Path(__file__).resolve().parent.parent


def test_readme_figures_are_those_of_the_result_files() -> None:
    command = [sys.executable, "-m", "integration.figures.build", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert newest is not None
    assert project is not None
    assert newest[1] == project[1] == version("sglang-nsa-plugin")
    assert f"sglang-nsa-plugin {newest[1]}: adapter" in (ROOT / "README.md").read_text()


def test_order_of_the_readme() -> None:
    """What it does in three sentences and a picture; then what a new user asks, one after the other."""
    opening, *sections = (ROOT / "README.md").read_text().split("\n## ")
    text, _, picture = opening.partition("![")
    assert len(re.findall(r"[a-z]\.\s", text)) == 3
    assert picture.endswith("(docs/host-time.svg)\n")
    assert [section.partition("\n")[0] for section in sections] == [
        "Install and use",
        "Prove it",
        "What it costs and saves",
        "Tested releases and GPUs",
        "When something is not as expected",
        "How it works",
        "Build and develop",
    ]


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
    "sglang-nsa-plugin demo": "test_cli.py",
    "sglang-nsa-plugin bench": "test_bench.py",
    "curl localhost:30000/server_info": "needs a server: integration/serving/test_serving.py",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make demo": ".ci/run",
    "make test-release": ".ci/run",
    "make test-releases": "make test-release for each release, hours on a small machine",
    "make gpu-test": "needs a GPU",
    "make serve-test": "needs a GPU",
    "make bench": "needs a GPU",
    "make wheel": "test_wheel.py",
    "integration/gpu/gpu_host.sh": "needs a GPU host",
    "integration/gpu/gpu_test.py": "needs a GPU",
    "python3 docs/record.py": "test_record.py",
    "python3 -m integration.figures.build": "test_repository.py, with --check",
    "python3 -m integration.figures.plot": "needs matplotlib, which nothing else here does",
}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_command_of_the_documents_is_accounted_for(document: str) -> None:
    text = (ROOT / document).read_text()
    programs = r"(?:\w+=\S+ )*(?:pip|make|sglang-nsa-plugin|python3|integration/\S+)"
    written = re.findall(
        rf"^    (?:NSA_COMMIT=\$\(.*?\) )?((?!sglang-nsa-plugin \d){programs} .*)", text, re.M
    )
    written += re.findall(r"`((?:make|python3|curl|pip|sglang-nsa-plugin) [^`]+)`", text)
    written += re.findall(r"`(\S+\.(?:py|sh) [^`]+)`", text)
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


# Where the documents name files from, and what exists elsewhere or only once it is made.
FOLDERS = ("", "integration/results", "sglang_nsa_plugin")
NOT_HERE = {"dist/": "made by `make wheel`", "unpack.sh": "a GPU host's own"}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_paths_of_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = set(
        re.findall(r"[`(\s](\w[\w./-]*(?:/|\.(?:py|md|json|sh|svg)))(?=[`):,;\s]|$)", text, re.M)
    )
    assert len(paths) > 5
    missing = {
        path
        for path in paths - set(NOT_HERE)
        if "VERSION" not in path and not any((ROOT / folder / path).exists() for folder in FOLDERS)
    }
    assert missing == set()


# Flags and variables that are not this repository's own.
OF_SGLANG = {
    "--disable-cuda-graph",
    "--enable-metrics",
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
    "SGLANG_PLUGINS",
}
OF_PYTEST = {"PYTEST_ADDOPTS"}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_flags_and_variables_of_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"--[a-z][a-z-]+\b|\b[A-Z]+_[A-Z_]+\b", text))
    assert named
    files = [ROOT / "pyproject.toml"]
    files += [*(ROOT / "sglang_nsa_plugin").rglob("*.py"), *(ROOT / "integration").rglob("*.py")]
    files += (ROOT / "docs").glob("*.py")
    ours = "\n".join(path.read_text() for path in files)
    unknown = {name for name in named if not re.search(rf"(?<![\w-]){name}(?![\w-])", ours)}
    assert unknown <= OF_SGLANG | OF_PYTEST


@needs_sglang
def test_flags_and_variables_of_sglang_exist() -> None:
    (package,) = find_spec("sglang").submodule_search_locations  # type: ignore[union-attr]
    files = ("server_args.py", "environ.py", "plugins/__init__.py")
    text = "\n".join((Path(package) / "srt" / name).read_text() for name in files)
    assert [name for name in sorted(OF_SGLANG) if name not in text] == []


def test_metrics_of_the_documents_exist() -> None:
    """Counters by name; their labels: tests/adapters/test_metrics.py."""
    named = set(re.findall(r"`(?:sglang_nsa_plugin:)?(\w+)_total\b", (ROOT / "README.md").read_text()))
    assert named == {*metrics.COUNTERS, "fallbacks"}


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
