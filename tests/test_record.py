"""docs/record.py: commands on a real terminal, and what stands on its screen."""

from __future__ import annotations

import sys

import pytest
from commands import needs_sglang
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import record

SHOW = """
import os, sys
print(sys.stdout.isatty(), os.get_terminal_size().columns)
from rich.console import Console
Console().print("a word", style="bold red")
"""
BAR = """
from rich.console import Console
from rich.progress import track
console = Console()
for step in track(range(3), description="steps", transient=True, console=console):
    pass
console.print("after")
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_a_command_runs_on_a_terminal_of_the_width(columns):
    code, raw = record.on_terminal([sys.executable, "-c", SHOW], "", columns)
    assert code == 0
    assert "\x1b[1;31ma word" in raw
    assert record.on_screen(raw) == f"True {columns}\na word"


def test_a_progress_bar_is_shown_and_gone_in_the_end():
    _, raw = record.on_terminal([sys.executable, "-c", BAR], "", 80)
    assert "steps" in raw
    assert record.on_screen(raw) == "after"


@pytest.mark.parametrize(
    ("raw", "screen"),
    [
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("first\rlast", "lastt"),
        ("gone\r\x1b[2Kkept", "kept"),
        ("kept\r\ngone\x1b[1A\r\nnew \x1b[K", "kept\nnew"),
        ("\x1b[?25lhidden cursor\x1b[?25h", "hidden cursor"),
    ],
)
def test_what_was_written_over_is_gone(raw, screen):
    assert record.on_screen(raw) == screen


def test_an_unknown_control_sequence_is_told():
    with pytest.raises(ValueError, match="control sequence"):
        record.on_screen("\x1b[5;5H")


@needs_sglang
def test_verify_on_a_terminal_has_colour_and_a_progress_bar():
    code, raw = record.on_terminal([sys.executable, "-m", "sglang_nsa_plugin"], "verify", 80)
    assert code == 0
    assert "looking around" in raw
    assert "\x1b[1;32m" in raw
    lines = record.on_screen(raw).splitlines()
    assert lines[0].startswith("sglang-nsa-plugin ")
    assert max(len(line) for line in lines) <= 80
    assert "\x1b" not in "".join(lines)


def test_recordings_are_written_for_each_width(tmp_path, monkeypatch):
    monkeypatch.setitem(record.RECORDINGS, "verify", record.Recording("verify --help"))
    arguments = ["record.py", "verify", "--columns", "80", "120", "--into", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert record.main() == 0
    for width in (80, 120):
        lines = (tmp_path / f"verify-{width}.txt").read_text().splitlines()
        assert lines[0] == "$ sglang-nsa-plugin verify --help"
        assert 70 < max(len(line) for line in lines) <= width


def test_a_command_that_needs_a_gpu_is_left_out_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record.shutil, "which", lambda name: None)
    assert record.record("bench", [80], tmp_path)
    assert capsys.readouterr().out == "bench: left out, it needs an NVIDIA GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_recordings_are_those_of_the_commands():
    commands = [recording.command.split()[0] for recording in record.RECORDINGS.values()]
    assert commands == ["verify", "demo", "bench"]
