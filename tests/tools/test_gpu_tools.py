"""What integration/gpu/ holds beside the kernel, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration.gpu import bench, gather_floor
from sglang_nsa_plugin.adapters import supported

ROOT = Path(__file__).resolve().parent.parent.parent
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, make bench and tests/gpu/test_gpu_bench.py cover it"
)


@without_gpu
def test_builds_of_the_kernel_are_not_compared_without_a_gpu():
    command = [sys.executable, "-m", "integration.gpu.ab_kernels", "any.so"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "ab_kernels: needs an NVIDIA GPU, torch finds none\n"


@without_gpu
def test_the_floor_writes_the_pages_of_its_rows_and_nothing_else():
    slots = torch.randint(2**30, (3, 1_000), dtype=torch.int32)
    pages = (slots[:, :777:64] // 64).repeat_interleave(4, dim=0)
    table = torch.empty((12, 16), dtype=torch.int32)
    launches = dict(gather_floor.launches(slots, table, 777, 4, 64))
    assert len(launches) == len(gather_floor.BLOCKS) * len(gather_floor.WARPS)
    for name, launch in launches.items():
        table.fill_(-1)
        launch()
        assert table[:, :13].equal(pages), name
        assert (table[:, 13:] == -1).all(), name


def run_of(us, commit="0" * 40, adapter="in-graph"):
    row = {
        "decode_impl": "flashmla_sparse", "requests": 8, "length": 64, "width": 64, "draft_tokens": 4,
        "tables": "paged", "bytes": {"read": 64, "written": 64},
        "gpu_us": {"cuda": us, "sglang_kernel": 9.0}, "gpu_quartiles": {"cuda": [us, us]},
        "host_us": {"cuda": 2.0, "sglang_kernel": 9.0}, "host_quartiles": {"cuda": [2.0, 2.0]},
        "compiles": {"sglang": 0, "ours": 0},
    }  # fmt: skip
    part = {"gpu": "a GPU", "adapter": adapter, "copy_gb_s": {"median": 1.0}, "cases": [row]}
    return {"commit": commit, "parts": {"bench": part, "gather": [], "widths": []}}


def test_bench_fails_where_the_committed_run_was_faster(capsys):
    assert bench.compared(run_of(1.0, "abcdefgh"), run_of(2.0)) == 1
    text = capsys.readouterr().out
    assert text.startswith("Compared with commit abcdefg:\nRegressions beyond noise: 1 of 2 times\n")
    assert bench.compared(run_of(2.0), run_of(1.0)) == 0


def test_a_release_without_graphs_has_no_goals(capsys):
    assert bench.compared(run_of(1.0, adapter="eager"), run_of(2.0, adapter="eager")) == 0
    assert capsys.readouterr().out.startswith("No goals")


def test_the_first_bench_of_a_gpu_shows_the_goals_alone(capsys):
    assert bench.compared(None, run_of(3.5)) == 0
    text = capsys.readouterr().out
    assert text.startswith("No committed run of this GPU to compare with.\n")
    assert "paged_kernel     1 missed" in text


@without_gpu
@pytest.mark.parametrize("role", ["draft-extend", "draft-decode", "verify", "decode"])
def test_every_replay_of_the_soak_is_checked(tmp_path, role):
    """On the CPU, in the same processes; the last replay, too."""
    if role == "decode" and supported.why_no_decode_fence() is not None:
        pytest.skip("this SGLang frees req_to_token before a decode graph is replayed")
    file = tmp_path / "soak.json"
    command = [sys.executable, "-m", "integration.gpu.soak", "--role", role, "--json", str(file)]
    options = ["--replays", "24", "--processes", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, check=False)
    found = json.loads(file.read_text())
    assert (done.returncode, found["role"], found["passed"]) == (0, role, True)
    assert (found["replays"], found["checks"], found["mismatches"]) == (24, 24, 0)
    assert found["values_compared"] > 24 * 1_000
