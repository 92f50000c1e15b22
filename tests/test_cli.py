"""What the commands have in common: help, exit codes, errors in one line, the terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import terminal
from commands import command, needs_sglang, program

from sglang_nsa_plugin.cli import main
from sglang_nsa_plugin.state import ALL_ROLES, ROLES

COMMANDS = ("verify", "demo", "bench", "ab")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_into_80_columns_and_gives_an_example(name):
    done = command(name, "--help", COLUMNS="80")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[-1].startswith(f"example: sglang-nsa-plugin {name}")
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_the_help_can_be_parsed(name):
    lines = command(name, "--help", COLUMNS="200").stdout.splitlines()
    example = lines[-1].removeprefix("example: sglang-nsa-plugin ").partition(" | ")[0]
    assert main._parser().parse_args(example.split()).command == name


def test_help_names_every_command():
    done = command("--help", COLUMNS="80")
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", done.stdout, re.MULTILINE)
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_an_unknown_command_ends_with_the_choices():
    done = command("prove")
    assert done.returncode == 2
    for name in COMMANDS:
        assert name in done.stderr


@pytest.mark.parametrize("steps", ["0", "-3", "many", "1000001", "٣"])
def test_the_number_of_steps_is_validated(steps):
    done = command("demo", "--steps", steps)
    assert done.returncode == 2
    assert f"must be a whole number, 1 to 1,000,000, got '{steps}'" in done.stderr


WITHOUT_SGLANG = "import sys; sys.modules['sglang'] = None"


def test_an_expected_error_is_one_line():
    done = program(WITHOUT_SGLANG, "demo")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    here = f"this Python, {sys.executable}: "
    assert line.startswith(f"sglang-nsa-plugin demo: SGLang is not installed in {here}")
    assert line.endswith("(--debug shows where)")


@pytest.mark.parametrize("arguments", [("--debug", "demo"), ("demo", "--debug")])
def test_debug_shows_the_traceback(arguments):
    done = program(WITHOUT_SGLANG, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ")
    assert "in _load_and_compare" in done.stderr


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    path = tmp_path / "missing" / "verify.json"
    done = command("verify", "--json", str(path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sglang-nsa-plugin verify: --json {path}: there is no folder ")


RAISE = """
from sglang_nsa_plugin.cli import verify
def run(json_path):
    raise {error}
verify.run = run
"""


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('first\\nsecond')",
        "__import__('sglang_nsa_plugin.dispatch').dispatch.BackendUnavailableError('first second')",
        "__import__('sglang_nsa_plugin.kernels.library').kernels.library.LibraryUnavailableError("
        "'first second')",
    ],
)
def test_a_kernel_that_cannot_run_is_one_line(error):
    done = program(RAISE.format(error=error), "verify")
    assert done.returncode == 1
    assert done.stderr == "sglang-nsa-plugin verify: first second (--debug shows where)\n"


def test_a_defect_keeps_its_traceback():
    done = program(RAISE.format(error="TypeError('wrong')"), "verify")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ")


def test_ctrl_c_ends_without_a_traceback():
    done = program(RAISE.format(error="KeyboardInterrupt"), "verify")
    assert done.returncode == 130
    assert done.stderr == ""


# On a terminal


def output_on_terminal(arguments: str, **environment: str) -> str:
    program = [sys.executable, "-m", "sglang_nsa_plugin", *arguments.split()]
    code, output = terminal.run(program, COLUMNS, **environment)
    assert code == 0
    return output


WAITING = {
    "verify": ["reading versions", "filling"],
    "demo --steps 3": ["loading SGLang", "draft-extend steps", "draft-decode steps", "verify steps"],
}
FIRST_LINE = {"verify": "[ok]  sglang-nsa-plugin ", "demo --steps 3": "sglang-nsa-plugin "}
COLUMNS = 80
COLOUR = re.compile(r"\x1b\[[\d;]*3\d")


@needs_sglang
@pytest.mark.parametrize("arguments", WAITING)
def test_a_terminal_gets_a_bar_and_a_coloured_verdict(arguments):
    output = output_on_terminal(arguments)
    screen = terminal.final_screen(output)
    for waiting in WAITING[arguments]:
        assert waiting in output
        assert waiting not in "\n".join(screen)
    assert "\x1b[1;32m" in output
    assert screen[0].startswith(FIRST_LINE[arguments])
    assert max(len(line) for line in screen) <= COLUMNS


@needs_sglang
@pytest.mark.parametrize("arguments", WAITING)
def test_no_color_switches_the_colours_off(arguments):
    output = output_on_terminal(arguments, NO_COLOR="1")
    assert WAITING[arguments][0] in output
    assert not COLOUR.search(output)


@needs_sglang
@pytest.mark.parametrize("arguments", WAITING)
def test_a_pipe_gets_neither_bars_nor_colours(arguments):
    done = command(*arguments.split())
    assert done.returncode == 0
    assert done.stdout.startswith(FIRST_LINE[arguments])
    assert "\x1b" not in done.stdout + done.stderr
    for waiting in WAITING[arguments]:
        assert waiting not in done.stdout + done.stderr


# The roles of demo

WITHOUT_ROLES = """
import dataclasses
from sglang_nsa_plugin.adapters import in_graph
takeovers = {"draft-extend": in_graph.ADAPTER.takeovers["draft-extend"]}
in_graph.ADAPTER = dataclasses.replace(in_graph.ADAPTER, takeovers=takeovers)
"""
WRONG_IN_VERIFY = """
from sglang_nsa_plugin.adapters.captured_fill import BackendFills
def wrong(fills, metadata):
    metadata.cu_seqlens_k.add_(fills.role.name == "verify")
BackendFills.refresh_derived = wrong
"""
LEFT_TO_SGLANG = """
from sglang_nsa_plugin.adapters.captured_fill import BackendFills
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
def left(fills, captured, batch):
    if fills.role.name != "draft-decode":
        return True
    return fills.leave_to_sglang(FallbackReason.INPUTS_REPLACED)
BackendFills.validate = left
"""


def demo(text: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A short one after this program, and what it wrote as JSON."""
    path = folder / "demo.json"
    done = program(text, "demo", "--steps", "2", "--json", str(path))
    return done, json.loads(path.read_text())


@needs_sglang
def test_demo_compares_every_role(tmp_path):
    done, found = demo("", tmp_path)
    assert done.returncode == 0
    assert list(found["roles"]) == list(ALL_ROLES)
    filled = {role: part for role, part in found["roles"].items() if "declined" not in part}
    assert set(ROLES) <= set(filled)
    for role in set(found["roles"]) - set(filled):  # decode, up to 0.5.17
        assert "from SGLang 0.5.18 on" in found["roles"][role]["declined"]
    assert all(sum(part["compared"].values()) > 300 for part in filled.values())
    replays = {role: state["replays"] for role, state in found["state"]["roles"].items()}
    assert {role: replays[role] for role in filled} == dict.fromkeys(filled, 2)
    total = sum(sum(part["compared"].values()) for part in filled.values())
    steps = f"{2 * len(filled)} steps ({', '.join(filled)})"
    assert f"EQUAL: all {total:,} values of {steps}" in " ".join(done.stdout.split())
    assert len([target for target in found["hook_targets"] if "MultiStepBackend" in target]) == 4


@needs_sglang
def test_demo_says_which_roles_the_release_does_not_have(tmp_path):
    done, found = demo(WITHOUT_ROLES, tmp_path)
    assert (done.returncode, found["verdict"]) == (0, "equal")
    why_not = "with this SGLang release the plugin fills no verify metadata"
    assert found["roles"]["verify"] == {"declined": why_not}
    assert "values of 2 steps (draft-extend)" in done.stdout


@needs_sglang
@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (WRONG_IN_VERIFY, "the first: verify cu_seqlens_k[0]: SGLang 0, ours 1"),
        (LEFT_TO_SGLANG, "draft-decode 0, fallbacks {'input tensors are not the captured ones': 2}"),
    ],
)
def test_demo_finds_what_is_wrong_in_one_role(planted, said, tmp_path):
    done, found = demo(planted, tmp_path)
    assert (done.returncode, found["verdict"]) == (1, "different")
    assert said in " ".join(done.stdout.split())
    assert "draft-extend 2, fallbacks {}" in " ".join(done.stdout.split())
