"""What the documents promise is there: links, commands, flags, paths, versions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import needs_sglang

from integration.figures import gain
from sglang_nsa_plugin import metrics
from sglang_nsa_plugin.adapters import releases, switch
from sglang_nsa_plugin.cli import main
from sglang_nsa_plugin.options import DEFAULT_ROLES

ROOT = Path(__file__).resolve().parent.parent
JSON_TYPE = "Content-Type: application/json"
DOCUMENTS = [
    *(str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])),
    "tests/README.md",
]
WRITTEN = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/ab.md",
    "docs/architecture.md",
    "docs/failure-modes.md",
    "docs/operate.md",
]


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


# README


def test_readme_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_example_of_the_readme_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"print\(.*\)  # (.+)", example)
    assert done.stdout.strip() == shown


def test_figures_of_the_readme_are_those_of_a_result_file() -> None:
    """Host time of all roles' metadata in a step, and the memory of their tables."""
    parts = json.loads(text_of("integration/results/serve-0.5.17.json"))["parts"]
    found, tables = parts["host_time"], parts["tables"]
    assert all("H200" in gpu for part in (found, tables) for gpu in part["of"]["gpus"])
    times = [sum(found["median_us_by_role"][arm].values()) for arm in ("plugin", "sglang")]
    assert re.findall(r"(\d+) µs", text_of("README.md")) == [f"{us:.0f}" for us in times]
    stated = re.findall(r"([\d,]+) MB", text_of("README.md"))
    assert stated == [f"{tables[which]:,}" for which in ("tables_mb", "before_mb")]


def test_the_readme_says_where_a_step_is_as_long_as_sglangs() -> None:
    """Beside another process on the GPU, in some cells; in none it is longer."""
    files = sorted(ROOT.glob("integration/results/gain-*-0.5.17.json"))
    parts = [part for path in files for part in json.loads(path.read_text())["parts"].values()]
    whole = [part for part in parts if "cell" in part and set(part["roles"]) == set(DEFAULT_ROLES)]
    named = [part["cell"] for part in whole if part.get("beside")]
    ratios = [cell["step_on_over_off"]["median"] for cell in named]
    most = re.findall(r"up to (\d+) % shorter, or no difference", text_of("README.md"))
    assert most == [f"{100 * (1 - min(ratios)):.0f}"]
    differing = [cell["step_on_over_off"]["median"] for cell in named if gain.differs(cell)]
    assert len(differing) < len(named)
    assert max(differing) < 1
    cells = [part["cell"] for part in whole]
    (many,) = [cell for cell in cells if cell["load"] == "256" and cell["resolved"]]
    assert ("no difference at 256" in text_of("README.md")) is not gain.differs(many)


def test_the_readme_claims_the_gain_that_was_measured() -> None:
    """With the roles that are filled by default, alone on a GPU: in how many resolved cells a step is
    shorter, and by how much at least and at most."""
    files = sorted(ROOT.glob("integration/results/gain-*-0.5.17.json"))
    runs = [gain.claimed(json.loads(path.read_text())["parts"], DEFAULT_ROLES) for path in files]
    by_cpu, by_gpu = gain.by_bound([part for parts in runs for part in parts])
    claim = rf"^- CPU-bound .* {in_percent(by_cpu, 0)} % shorter in {of_resolved(by_cpu)} measurements"
    assert re.search(claim, text_of("README.md"), re.M)
    of_160k, of_1m = ([part for part in by_gpu if f"-{k}-" in part["regime"]] for k in ("160k", "1m"))
    assert len(of_160k) + len(of_1m) == len(by_gpu)
    claim = (
        f"for 160 k {in_percent(of_160k, 1)} % shorter, for 1 M {in_percent(of_1m, 1)} % "
        f"({of_resolved(by_gpu)} measurements)"
    )
    assert claim in " ".join(text_of("README.md").split())


def in_percent(parts: list[dict[str, Any]], digits: int) -> str:
    """The least and the most by which a step is shorter in these cells, where it is."""
    cells = [part["cell"] for part in parts if gain.differs(part["cell"])]
    gains = [100 * (1 - cell["step_on_over_off"]["median"]) for cell in cells]
    return f"{min(gains):.{digits}f} to {max(gains):.{digits}f}"


def of_resolved(parts: list[dict[str, Any]]) -> str:
    resolved = [part for part in parts if part["cell"]["resolved"]]
    return f"{sum(gain.differs(part['cell']) for part in resolved)} of {len(resolved)}"


def test_the_readme_says_what_the_newest_release_gains() -> None:
    """On a server for 1 M, where the GPU bounds the step."""
    parts = json.loads(text_of("integration/results/gain-h200-0.5.23.json"))["parts"]
    stated = re.search(
        r"0\.5\.23, .* 1 M, ([\d.]+) % shorter with 4 at once and ([\d.]+) % with 64",
        text_of("README.md"),
    )
    for load, percent in zip((4, 64), stated.groups() if stated else (), strict=True):
        cell = parts[f"61-layers-1m-bf16.{load}.draft-decode+draft-extend+verify.wide-tables-kept"][
            "cell"
        ]
        assert percent == f"{100 * (1 - cell['step_on_over_off']['median']):.1f}"


def test_releases_of_the_readme_are_those_that_were_tested() -> None:
    oldest, newest = releases.TESTED[0], releases.TESTED[-1]
    assert f"| SGLang | {oldest} to {newest};" in text_of("README.md")
    assert f"SGLang {oldest} to {newest}" in text_of("CHANGELOG.md")


def test_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)
    project = re.search(r'^version = "(.+)"', text_of("pyproject.toml"), re.MULTILINE)
    assert newest is not None
    assert project is not None
    assert newest[1] == project[1] == version("sglang-nsa-plugin")
    assert f"sglang-nsa-plugin {newest[1]}: draft-extend: adapter" in text_of("README.md")


def test_metrics_of_the_documents_exist() -> None:
    """Counters by name; their labels: tests/adapters/test_metrics.py."""
    named = set(re.findall(r"`(?:sglang_nsa_plugin:)?(\w+)_total\b", text_of("README.md")))
    assert named == {*metrics.COUNTERS, "fallbacks"}


# Links, paths, flags


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_the_documents_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    local = [link.partition("#")[0] for link in links if not link.startswith(("https://", "#"))]
    folder = (ROOT / document).parent
    assert [link for link in local if not (folder / link).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_map_is_linked(document: str) -> None:
    assert "](docs/architecture.md)" in text_of(document)


# Where the documents name files from, and what exists elsewhere or only once it is made.
FOLDERS = ("", "integration/results", "sglang_nsa_plugin")
NOT_HERE = {
    "dist/": "made by `make wheel`",
    "unpack.sh": "a GPU host's own",
    "lib/nsa_metadata.so": "made by the build",
    "build/old/nsa_metadata.so": "made by cmake",
    "build/new/nsa_metadata.so": "made by cmake",
    "OLD.json": "stands for a name",
    "NEW.json": "stands for a name",
}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_paths_of_the_documents_exist(document: str) -> None:
    paths = set(
        re.findall(
            r"[`(\s](\w[\w./-]*(?:/|\.(?:py|md|json|sh|so|svg|cu|toml)))(?=[`):,;\s]|$)",
            text_of(document),
            re.M,
        )
    )
    assert paths
    missing = {path for path in paths if not any((ROOT / folder / path).exists() for folder in FOLDERS)}
    assert missing <= set(NOT_HERE)


# Flags and variables that are not this repository's own.
OF_SGLANG = {
    "--disable-cuda-graph",
    "--enable-metrics",
    "--log-level",
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
    "SGLANG_LOGGING_CONFIG_PATH",
    "SGLANG_PLUGINS",
}
OF_OTHERS = {
    "--build": "cmake",
    "--no-cache-dir": "pip",
    "PYTEST_ADDOPTS": "pytest",
    "LD_LIBRARY_PATH": "the loader",
}


@pytest.mark.parametrize("document", [*WRITTEN, "CHANGELOG.md"])
def test_flags_and_variables_of_the_documents_exist(document: str) -> None:
    named = set(
        re.findall(
            r"--[a-z][a-z-]+\b|\b(?:NSA|SGLANG|PYTEST|LD|CUDA|TRITON)_[A-Z_]+\b", text_of(document)
        )
    )
    files = [ROOT / "pyproject.toml", ROOT / "tests" / "conftest.py"]
    files += [*(ROOT / "sglang_nsa_plugin").rglob("*.py"), *(ROOT / "integration").rglob("*.py")]
    ours = "\n".join(path.read_text() for path in files)
    unknown = {name for name in named if not re.search(rf"(?<![\w-]){name}(?![\w-])", ours)}
    assert unknown <= {*OF_SGLANG, *OF_OTHERS}


@needs_sglang
def test_flags_and_variables_of_sglang_exist() -> None:
    (package,) = find_spec("sglang").submodule_search_locations  # type: ignore[union-attr]
    files = ("server_args.py", "environ.py", "plugins/__init__.py", "utils/common.py")
    text = "\n".join((Path(package) / "srt" / name).read_text() for name in files)
    assert [name for name in sorted(OF_SGLANG) if name not in text] == []


# Commands


VARIABLES = r"(?:[A-Z_]+=(?:\$\(.*?\)|\S+) )*"
PROGRAMS = (
    "apt-get",
    "pip",
    "tar",
    "make",
    "cmake",
    "curl",
    "python",
    "python3",
    "sglang-nsa-plugin",
    "sglang",
)
PROGRAM = rf"{VARIABLES}(?:(?:{'|'.join(PROGRAMS)})(?! \d)|integration/\S+\.sh)"
# Code blocks with a language, and the test that runs or reads them.
BLOCKS = {
    ("README.md", "python"): "test_example_of_the_readme_runs",
    ("docs/operate.md", "dockerfile"): "test_the_images_line_installs_a_wheel_of_the_build_context",
    ("docs/operate.md", "yaml"): "test_the_pods_command_takes_the_config_map",
    ("docs/recipes.md", "bash"): "test_this_release_parses_every_recipe_that_names_it",
}


def commands(text: str) -> list[str]:
    """The commands of a document: lines of its code blocks, and quoted ones within sentences."""
    lines = re.findall(rf"^ {{4,}}({PROGRAM} .+)$", text, re.MULTILINE)
    quoted = re.findall(rf"`({PROGRAM} [^`]+)`", text)
    return [re.split(r"\s{2,}#", line)[0].strip() for line in (*lines, *quoted)]


def wrong_with(command: str) -> str | None:
    """Why a command of the documents cannot work as it is written, or None."""
    if " && " in command:
        return next(filter(None, map(wrong_with, command.split(" && "))), None)
    words = shlex.split(re.sub(f"^{VARIABLES}", "", command))
    program, rest = words[0], words[1:]
    if program == "make":
        return wrong_with_make(rest)
    if program == "sglang-nsa-plugin":
        return None if parses(rest) else "the parser of sglang-nsa-plugin refuses it"
    if program in ("python", "python3"):
        return wrong_with_module(rest)
    if program.endswith(".sh"):
        return wrong_with(" ".join(rest[1:])) if os.access(ROOT / program, os.X_OK) else "no such script"
    if program == "pip":
        made = re.sub(r"-\*", f"-{version('sglang-nsa-plugin')}-py3-none-any", rest[-1])
        ours = rest[-1] == "." or re.fullmatch(r"dist/sglang_nsa_plugin-.+\.whl", made)
        return None if rest[0] == "install" and ours else "no package index has the package"
    if program == "cmake":
        sources = rest[rest.index("-S") + 1] if "-S" in rest else "csrc"
        return None if (ROOT / sources / "CMakeLists.txt").is_file() else "no CMakeLists.txt there"
    if program == "curl":
        return wrong_with_request(*rest)
    if program == "sglang":  # its flags: tests/adapters/test_operate.py
        return None if rest == ["serve"] or "--model-path" in rest else "it wants --model-path"
    if program == "tar":  # of what one of our programs lists
        listed = re.search(r"\$\((.+)\)", command)
        return wrong_with(listed[1]) if listed else "it packs nothing of ours"
    if program == "apt-get":
        return None if rest[0] == "install" else "nothing but packages"
    return "unknown program"


def wrong_with_request(url: str, *more: str) -> str | None:
    if url.endswith("/server_info") and not more:
        return None
    if url.endswith("/set_internal_state") and more[:-1] == ("-H", JSON_TYPE, "-d"):
        return None if json.loads(more[-1])["server_args"].keys() == {switch.KEY} else "not our key"
    return "not a route that the plugin changes"


def wrong_with_make(words: list[str]) -> str | None:
    makefile = text_of("Makefile")
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable and f"$({name})" not in makefile:
            return f"the Makefile does not use {name}"
        if not is_variable and not re.search(rf"^{name}:", makefile, re.MULTILINE):
            return f"the Makefile has no target {name}"
    return None


def wrong_with_module(words: list[str]) -> str | None:
    if words[0] != "-m":
        return "scripts run as modules, with -m"
    path = ROOT / (words[1].replace(".", "/") + ".py")
    path = path if path.is_file() else ROOT / words[1].replace(".", "/") / "__main__.py"
    if not path.is_file():
        return f"there is no module {words[1]}"
    flags = [word for word in words[2:] if word.startswith("--")]
    missing = [flag for flag in flags if f'"{flag}"' not in path.read_text()]
    return f"{words[1]} has no {missing[0]}" if missing else None


def parses(arguments: list[str]) -> bool:
    try:
        main._parser().parse_args(arguments)
    except SystemExit:
        return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents_can_be_run(document: str) -> None:
    wrong = {command: wrong_with(command) for command in commands(text_of(document))}
    assert {command: why for command, why in wrong.items() if why is not None} == {}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_of_the_documents_is_left_out(document: str) -> None:
    """Lines of code blocks that begin with a program of this machine, and blocks with a language."""
    text = text_of(document)
    first = set(re.findall(rf"^ {{4,}}{VARIABLES}([a-z][\w.-]+) \S", text, re.MULTILINE))
    assert {word for word in first - {*PROGRAMS} if shutil.which(word)} == set()
    languages = set(re.findall(r"^ *```([a-z]+)$", text, re.MULTILINE))
    assert {(document, language) for language in languages} <= set(BLOCKS)


def test_sglangs_own_commands_are_where_its_parser_reads_them() -> None:
    named = [
        document
        for document in DOCUMENTS
        if re.search(r"sglang serve -|launch_server", text_of(document))
    ]
    assert named == ["docs/operate.md", "docs/recipes.md"]


def test_the_blocks_tests_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in BLOCKS.values() if f"\ndef {name}(" not in tests] == []


def test_commands_are_found() -> None:
    assert len(commands(text_of("README.md"))) >= 8
    assert len(commands(text_of("CONTRIBUTING.md"))) >= 15


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "make serve-test PARTS=cases",
        "sglang-nsa-plugin check",
        "sglang-nsa-plugin bench --fast",
        "python3 -m integration.gpu.benches",
        "python3 -m integration.gpu.gpu_test --just tests",
        "python3 docs/record.py",
        "pip install sglang-nsa-plugin",
        "sglang serve --config server.yaml",
        f"curl x/set_internal_state -H '{JSON_TYPE}' -d '{{\"server_args\": {{\"nsa\": 0}}}}'",
        "NSA_COMMIT=$(git rev-parse HEAD) integration/gpu/gpu_host.sh FOLDER make gpu-tests",
        "integration/gpu/host.sh FOLDER make gpu-test",
        "cmake -S src -B build",
    ],
)
def test_a_command_that_cannot_be_run_is_found(command: str) -> None:
    assert commands(f"    {command}    # why\n") == [command]
    assert wrong_with(command) is not None


# Pythons, SGLang's version, the forge


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def project() -> str:
    return text_of("pyproject.toml").partition("\n[project]\n")[2].partition("\n[")[0]


def test_pythons_that_are_claimed_are_those_that_are_tried() -> None:
    """3.11 by `make test`, the others by `make test-python`; tests.yml runs them all."""
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project())
    (matrix,) = re.findall(
        r'^ +version: \["3.+\]$', text_of(".github/workflows/tests.yml"), re.MULTILINE
    )
    assert claimed == sorted([*re.findall(r"3\.\d+", matrix), "3.11"], key=lambda v: int(v[2:]))
    assert f'requires-python = ">={claimed[0]}"' in project()
    (row,) = re.findall(r"^\| Python \| (.*) \|$", text_of("docs/releasing.md"), re.MULTILINE)
    assert re.findall(r"3\.\d+", row) == claimed


def test_sglang_has_no_bound_and_the_documents_say_why() -> None:
    dependencies = re.findall(r"^dependencies = \[(.*)\]$", project(), re.MULTILINE)
    assert len(dependencies) == 1
    assert "sglang" not in dependencies[0]
    (row,) = re.findall(r"^\| SGLang \| (.*) \|$", text_of("docs/releasing.md"), re.MULTILINE)
    assert row.startswith(f"no bound; tested: {releases.TESTED[0]} to {releases.TESTED[-1]}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_have_no_rights(path: Path) -> None:
    """`make lint` runs zizmor on them, which knows their schema."""
    text = path.read_text()
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [
        use for use in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)
    ] == []
    assert "\npermissions: {}\n" in text
    assert set(re.findall(r"^ +(\w+): (?:read|write)$", text, re.MULTILINE)) == {"contents"}
    assert "contents: write" not in text
    assert "secrets." not in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_the_makefile_has(path: Path) -> None:
    text = path.read_text()
    (targets,) = re.findall(r"target: \[(.*)\]", text) or [""]
    runs = re.findall(r"\b(make [\w-]+)", "\n".join(re.findall(r"run: (.*)", text)))
    runs += [f"make {target}" for target in targets.split(", ") if target]
    assert runs
    assert {run: wrong_with(run) for run in runs if wrong_with(run) is not None} == {}


def test_what_a_release_needs_is_installed_by_its_workflow() -> None:
    (listed,) = re.findall(r"^    apt-get install (.*)$", text_of("docs/releasing.md"), re.MULTILINE)
    (installed,) = re.findall(
        r"apt-get install --yes (.*)$", text_of(".github/workflows/wheels.yml"), re.M
    )
    assert listed == installed


# Tests


def test_tests_that_the_documents_name_exist() -> None:
    named = set(re.findall(r"`([\w/.]+\.py)::(\w+)`", text_of("tests/README.md")))
    assert len(named) > 50
    missing = []
    for file, test in sorted(named):
        path = ROOT / (file if file.startswith("integration/") else f"tests/{file}")
        if not path.is_file() or f"\ndef {test}(" not in path.read_text():
            missing.append(f"{file}::{test}")
    assert missing == []


@pytest.mark.parametrize(("letter", "fewest"), [("S", 10), ("A", 3), ("C", 3)])
def test_every_failure_mode_names_its_tests(letter: str, fewest: int) -> None:
    """S: in a server; A: from Python; C: commands."""
    number = rf"^\| ({letter}\d+) \|"
    listed = re.findall(number, text_of("docs/failure-modes.md"), re.MULTILINE)
    shown = re.findall(rf"{number} .*`[\w/]+\.py::\w+`.* \|$", text_of("tests/README.md"), re.MULTILINE)
    assert len(listed) > fewest
    assert listed == shown == [f"{letter}{n}" for n in range(1, len(listed) + 1)]


def test_test_files_are_described() -> None:
    described = text_of("tests/README.md").partition("\n## ")[0]
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert files == set(re.findall(r"`(test_\w+\.py)`", described))
