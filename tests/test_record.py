"""docs/record.py: commands on a real terminal, and what stands on its screen."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version

import pytest
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


def test_recordings_are_written_for_each_width(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(record.RECORDINGS, "verify", "verify --help")
    arguments = ["record.py", "verify", "--columns", "80", "120", "--into", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert record.main() == 0
    folder = tmp_path / record.machine()
    for width in (80, 120):
        lines = (folder / f"verify-{width}.txt").read_text().splitlines()
        assert lines[0] == "$ sglang-nsa-plugin verify --help"
        assert 70 < max(len(line) for line in lines) <= width
    record.keep_origin({"demo": {}}, folder / "origin.json")
    origin = json.loads((folder / "origin.json").read_text())
    assert list(origin) == ["verify", "demo"]
    assert origin["verify"]["versions"]["sglang-nsa-plugin"] == version("sglang-nsa-plugin")
    assert capsys.readouterr().out.count("exit code 0") == 2


def test_a_command_that_fails_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(record.RECORDINGS, "demo", "demo --steps 0")
    monkeypatch.setattr(sys, "argv", ["record.py", "demo", "--columns", "80", "--into", str(tmp_path)])
    assert record.main() == 1
    printed = capfd.readouterr()
    assert "exit code 2" in printed.out
    assert "--steps: must be a whole number" in printed.err


COMMITTED = sorted(record.FOLDER.glob("*/*.txt"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_recordings_fit_their_width_and_are_plain(path):
    name, _, columns = path.stem.rpartition("-")
    text = path.read_text()
    assert text.startswith(f"$ sglang-nsa-plugin {record.RECORDINGS[name]}\n")
    assert max(len(line) for line in text.splitlines()) <= int(columns)
    assert len(text.splitlines()) > 10
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text), "control characters"
    assert not re.search(r"""(?:^|[\s'"(])/\w+/""", text, re.MULTILINE), "a path of one machine"


@pytest.mark.parametrize("folder", sorted({path.parent for path in COMMITTED}), ids=lambda f: f.name)
def test_a_machines_recordings_are_whole_and_name_their_origin(folder):
    recorded = {path.stem.rpartition("-")[0] for path in folder.glob("*.txt")}
    assert recorded >= {"verify", "demo"}
    assert recorded == set(record.RECORDINGS) or folder.name == "cpu"
    for name in recorded:
        assert all((folder / f"{name}-{columns}.txt").is_file() for columns in record.COLUMNS)
    origins = json.loads((folder / "origin.json").read_text())
    assert set(origins) == recorded
    for origin in origins.values():
        assert bool(origin["gpus"]) == (folder.name == "gpu")
        assert len(origin["commit"]) >= 40


def test_there_are_recordings():
    assert COMMITTED
