"""The CUDA kernel of a k-pooling fill without a GPU: its source, compiled for the CPU.

``emulated_cuda.h`` runs each block's threads in turns. All of csrc/kpool.cu is tested but its launch:
the grid, the scans, the search.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from kpool_cases import KPoolCase, check, random_case
from test_fuzz import fuzz
from test_kpool import case_of

from sglang_nsa_plugin.kernels.compiled import KPoolBinder
from sglang_nsa_plugin.kpool_args import KPoolArgs

ROOT = Path(__file__).resolve().parent.parent
SMS = 132
BATCHES = 500  # each takes some 10 ms
INSTEAD_OF_THE_TWIN = """
#define NSA_WITH_CUDA
#include "emulated_cuda.h"
%s
namespace nsa {
void fill_kpool_on_cpu(const KPoolFill& fill) {
  const KPoolLaunch launch = kpool_launch(fill, %d);
  emulated::run(fill_kpool_kernel, launch, launch.blocks);
}
}  // namespace nsa
"""

Fill = Callable[[KPoolArgs], None]


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory) -> Fill:
    """A library whose CPU twin is the kernel."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    if None in (shutil.which("c++"), shutil.which("cmake")):
        pytest.skip("needs a C++ compiler and CMake")
    folder = tmp_path_factory.mktemp("kpool_kernel")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "sglang_nsa_plugin" / "kernels", folder / "sglang_nsa_plugin" / "kernels")
    shutil.copy(ROOT / "tests" / "emulated_cuda.h", folder / "csrc")
    source = INSTEAD_OF_THE_TWIN % (without_launch((ROOT / "csrc" / "kpool.cu").read_text()), SMS)
    (folder / "csrc" / "kpool_cpu.cc").write_text(source)
    build = folder / "build"
    options = ("-DNSA_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (
        ["cmake", "-S", folder / "csrc", "-B", build, *options],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    binder = KPoolBinder(tvm_ffi.load_module(str(build / "nsa_metadata.so")))
    return lambda args: binder(args)(0)


def without_launch(source: str) -> str:
    """csrc/kpool.cu up to the function that launches it, which is CUDA's syntax."""
    kernel, launches = re.subn(r"int fill_kpool_on_cuda\(.*?\n}\n", "", source, flags=re.DOTALL)
    assert launches == 1
    return kernel


def test_any_batch(fill: Fill, request: pytest.FixtureRequest) -> None:
    def run(case: KPoolCase) -> None:
        check(case, fill)

    fuzz(run, random_case, request.config.getoption("--fuzz-batches") or BATCHES)


@pytest.mark.parametrize("requests", [63, 64, 65, 128, 1000])
def test_rows_of_several_blocks(fill: Fill, requests: int) -> None:
    check(case_of([(977 * r) % 3000 for r in range(requests)]), fill)


def test_tables_of_several_blocks(fill: Fill) -> None:
    """A block copies 256 pages at a time, for one request or for as many as there are blocks."""
    seen = set()
    for seed in range(400):
        case = random_case(Random(seed))
        rows, pages = case.outputs.get("kpool_page_table", (0, 0))
        if pages > 256 and rows:
            check(case, fill)
            seen.add(pages)
    assert max(seen) > 512
