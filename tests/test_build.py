"""What the build says about CUDA: asked for and missing, not asked for, misspelt. Only configures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH holds compilers and this Python's scripts, but no nvcc."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "cc", "ld", "as", "ar", "make", "ninja", "uname", "sh"):
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{tools}"}


def configure(
    folder: Path, environment: dict[str, str], **options: str
) -> subprocess.CompletedProcess[str]:
    command = [
        "cmake",
        "-S",
        str(ROOT / "csrc"),
        "-B",
        str(folder),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command += [f"-D{name}={value}" for name, value in options.items()]
    cmake = shutil.which("cmake", path=environment["PATH"])
    assert cmake is not None, "cmake is missing; install the test extra: pip install '.[test]'"
    command[0] = cmake
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def sentence(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_cuda_asked_for_without_nvcc_fails_and_says_what_to_install(tmp_path, without_nvcc) -> None:
    done = configure(tmp_path / "build", without_nvcc, NSA_CUDA="ON")
    assert done.returncode != 0
    assert "NSA_CUDA=ON, but no nvcc was found. Install the CUDA 13 toolkit" in sentence(done.stderr)


def test_without_nvcc_the_cpu_twin_is_built_and_said(tmp_path, without_nvcc) -> None:
    done = configure(tmp_path / "build", without_nvcc, NSA_CUDA="AUTO")
    assert done.returncode == 0, done.stderr
    assert "building the CPU twin alone, WITHOUT the CUDA kernel" in sentence(done.stderr)


def test_cuda_switched_off_is_said(tmp_path, without_nvcc) -> None:
    done = configure(tmp_path / "build", without_nvcc, NSA_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert "building the CPU twin alone (NSA_CUDA=OFF)" in done.stdout


def test_unknown_switch_is_refused_with_the_choices(tmp_path, without_nvcc) -> None:
    done = configure(tmp_path / "build", without_nvcc, NSA_CUDA="YES")
    assert done.returncode != 0
    assert "NSA_CUDA must be AUTO, ON or OFF, got 'YES'." in sentence(done.stderr)


@pytest.fixture(params=["PATH", "CUDACXX"])
def old_nvcc(request, tmp_path, without_nvcc) -> tuple[Path, dict[str, str]]:
    """An nvcc of CUDA 12, which says its version and compiles nothing."""
    nvcc = tmp_path / "cuda12" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    if request.param == "PATH":
        return nvcc, {**without_nvcc, "PATH": f"{without_nvcc['PATH']}:{nvcc.parent}"}
    return nvcc, {**without_nvcc, "CUDACXX": str(nvcc)}


def test_an_old_nvcc_builds_the_cpu_twin_and_says_why(tmp_path, old_nvcc) -> None:
    """As README has it: without nvcc 13 the CPU code only, and a warning."""
    nvcc, environment = old_nvcc
    done = configure(tmp_path / "build", environment, NSA_CUDA="AUTO")
    assert done.returncode == 0, done.stderr
    assert f"{nvcc} is version 12.4, and the CUDA kernel needs nvcc 13.0 or newer" in sentence(
        done.stderr
    )
    assert "building the CPU twin alone, WITHOUT the CUDA kernel" in sentence(done.stderr)
    assert "`pip install .` builds the CPU code only" in (ROOT / "README.md").read_text()


def test_cuda_asked_for_with_an_old_nvcc_fails_and_says_what_pip_takes(tmp_path, old_nvcc) -> None:
    nvcc, environment = old_nvcc
    done = configure(tmp_path / "build", environment, NSA_CUDA="ON")
    assert done.returncode != 0
    said = sentence(done.stderr)
    assert f"NSA_CUDA=ON, but {nvcc} is version 12.4, and the CUDA kernel needs nvcc 13.0" in said
    assert "set CUDACXX to it, or build the CPU twin alone: NSA_CUDA=OFF pip install ." in said
    assert "-DNSA_CUDA" not in said
