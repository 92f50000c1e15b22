"""The CUDA graph that a repeated fill becomes, over a CUDA runtime that is faked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, nvcc = shutil.which("c++"), shutil.which("nvcc")
    if compiler is None or nvcc is None:
        pytest.skip("needs a C++ compiler and nvcc, whose headers declare the CUDA runtime")
    printed = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "-"], capture_output=True, text=True)
    (includes,) = [line for line in printed.stderr.splitlines() if line.startswith("#$ INCLUDES=")]
    include = includes.split('"')[1].removeprefix("-I")
    built = tmp_path_factory.mktemp("graph_launch") / "fake"
    sources = [ROOT / "csrc" / "graph_launch.cc", ROOT / "tests" / "fake_cuda_runtime.cc"]
    command = [
        compiler,
        "-std=c++17",
        "-pthread",
        "-I",
        include,
        "-I",
        ROOT / "csrc",
        *sources,
        "-o",
        built,
    ]
    subprocess.run(list(map(str, command)), check=True)
    return built


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("none", "pppp ci ggg p"),  # the last launch is on a stream that is captured
        ("instantiate", "pppp ci ppp p"),  # tried once
        ("create", "pppp ppp p"),
    ],
)
def test_a_graph_that_cannot_be_made_leaves_the_plain_launch(program, failing, calls) -> None:
    assert printed(program, failing) == [calls.replace(" ", ""), "errors=0", "left=0", "overlaps=0"]


def test_threads_launch_the_graph_one_after_another(program) -> None:
    calls = "pppp" + "ci" + 96 * "g"
    assert printed(program, "threads") == [calls, "errors=0", "left=0", "overlaps=0"]


def printed(program: Path, argument: str) -> list[str]:
    done = subprocess.run([program, argument], check=True, capture_output=True, text=True)
    return done.stdout.split()
