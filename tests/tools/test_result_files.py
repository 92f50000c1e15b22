"""Result files: one row a line, parts that merge, the GPUs that are left visible."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from integration import result_files

ROW = {"requests": 8, "us": {"cuda": 2.5, "sglang": 210.0}, "note": "µs × 3"}
ROWS = [{**ROW, "requests": n} for n in range(5)]


def test_one_row_is_one_line():
    value = {"date": "today", "versions": {"torch": "2.11.0"}, "parts": {"bench": {"cases": ROWS}}}
    text = result_files.as_text(value)
    assert json.loads(text) == value
    assert sum('"requests"' in line for line in text.splitlines()) == len(ROWS)
    assert all(line.count('"requests"') <= 1 for line in text.splitlines())
    assert ' "versions": {"torch": "2.11.0"},' in text.splitlines()


@pytest.mark.parametrize(
    "value", [{}, [], None, 1.5, "a", {"a": []}, [[1, 2]] * 99, {"a" * 200: {"b": ROWS}}]
)
def test_every_value_reads_back(value):
    assert json.loads(result_files.as_text(value)) == value


RECORD = {
    "adapter": "in-graph",
    "replays": 5,
    "checks": 5,
    "roles": {
        "draft-extend": {"adapter": "in-graph", "replays": 5, "checks": 5},
        "verify": {"adapter": "in-graph", "replays": 5, "checks": 4, "of_its_own": None},
    },
}


def test_a_role_keeps_what_differs_from_the_record_and_reads_whole_again():
    figures = {"ranks": [{"record": RECORD}], "roles": {"no": {"record": 1}}}
    short = result_files.without_repeats(figures)
    assert short["ranks"][0]["record"]["roles"] == {
        "draft-extend": {},
        "verify": {"checks": 4, "of_its_own": None},
    }
    assert short["roles"] == figures["roles"]
    for role, whole in RECORD["roles"].items():
        assert result_files.all_of_role(short["ranks"][0]["record"], role) == whole


def test_committed_files_are_as_they_are_written_and_small():
    paths = list((result_files.ROOT / "integration" / "results").iterdir())
    assert {path.suffix for path in paths} == {".json"}
    assert sum(path.stat().st_size for path in paths) < 1_000_000
    for path in paths:
        text = path.read_text()
        assert text == result_files.as_text(json.loads(text)) + "\n", path.name


def test_parts_that_stand_alone_stay_and_say_which_run_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_RESULTS_DIR", str(tmp_path))
    for commit, part, figure in (("a" * 40, "load", 1), ("b" * 40, "load", 2), ("c" * 40, "core", 3)):
        monkeypatch.setenv("NSA_COMMIT", commit)
        path = result_files.merge(
            "serve-0.json", "make serve-test", {part: {"figure": figure}}, alone=True
        )
    found = json.loads(path.read_text())
    assert found["commit"] == "c" * 40
    stamps = {name: (part["figure"], part["of"]["commit"]) for name, part in found["parts"].items()}
    assert stamps == {"load": (2, "b" * 40), "core": (3, "c" * 40)}
    result_files.merge("serve-0.json", "make bench", {"bench": {}})
    assert list(json.loads(path.read_text())["parts"]) == ["load", "core", "bench"]
    monkeypatch.setenv("NSA_COMMIT", "d" * 40)
    result_files.merge("serve-0.json", "make bench", {"bench": {}})
    assert list(json.loads(path.read_text())["parts"]) == ["bench"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def put(text: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


def test_gpus_are_those_that_are_left_visible(nvidia_smi, monkeypatch):
    nvidia_smi('echo "$@"')
    assert result_files.of_gpus("name") == ["--query-gpu=name --format=csv,noheader,nounits"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert result_files.of_gpus("name") == ["--query-gpu=name --format=csv,noheader,nounits --id 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert result_files.of_gpus("name") == []


def test_files_are_named_after_the_first_gpu(nvidia_smi):
    nvidia_smi("echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA H200'")
    assert result_files.gpu_name() == "h100-80gb-hbm3"
    nvidia_smi("true")
    with pytest.raises(RuntimeError, match="lists none"):
        result_files.gpu_name()


def test_the_committed_file_is_that_of_git(monkeypatch):
    name = "releases.json"
    assert result_files.committed(name)["command"] == "make test-releases"
    assert result_files.committed("no-such-file.json") is None
    monkeypatch.setenv("PATH", "")  # no git
    assert result_files.committed(name)["command"] == "make test-releases"


def test_results_that_a_run_writes_do_not_make_its_commit_another(monkeypatch, tmp_path):
    results, code = tmp_path / "integration" / "results" / "one.json", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    monkeypatch.delenv("NSA_COMMIT", raising=False)
    monkeypatch.setattr(result_files, "ROOT", tmp_path)
    assert result_files.commit() == "unknown"
    results.write_text("{}")
    code.write_text("1")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "all")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit = result_files.commit()
    assert len(commit) == 40
    results.write_text("[]")
    assert result_files.commit() == commit
    code.write_text("2")
    assert result_files.commit() == f"{commit}-dirty"
