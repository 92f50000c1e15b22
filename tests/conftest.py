"""Which implementations are tested here, and what a test that needs a GPU asks for.

Values, shapes and errors are tested on every machine. Triton runs through its interpreter where
there is no GPU, and compiled where there is one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import hypothesis  # noqa: E402
from cases import CPU, Backend  # noqa: E402
from memcpy_trace import MemcpyTrace  # noqa: E402

from sglang_nsa_plugin import log  # noqa: E402
from sglang_nsa_plugin.adapters.no_op import LAST_DRAFT_EXTEND  # noqa: E402
from sglang_nsa_plugin.adapters.outcome import OUTCOMES  # noqa: E402
from sglang_nsa_plugin.state import STATE, STATES, State  # noqa: E402

hypothesis.settings.register_profile("ci", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("ci")

GPU = torch.device("cuda", 0)
BACKENDS = [
    Backend(CPU, "cpu"),
    Backend(CPU, "torch"),
    *([] if HAS_GPU else [Backend(CPU, "triton")]),
    *(Backend(GPU, name) for name in ("cuda", "triton", "torch")),
]


def _param(backend: Backend) -> object:
    marks = [pytest.mark.gpu] if backend.device.type == "cuda" else []
    return pytest.param(backend, id=str(backend), marks=marks)


@pytest.fixture(scope="session", params=[_param(backend) for backend in BACKENDS])
def fill_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every implementation of the fill, on each device it runs on."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param.interpreted:
            # the interpreter takes a few ms for each program, also for those without work
            patch.setattr("sglang_nsa_plugin.kernels.triton.TABLE_PROGRAMS", 3)
        yield request.param


@pytest.fixture(autouse=True)
def _gpu_memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Some tests take a third of a GPU's memory; torch would keep it from other processes."""
    yield
    if request.node.get_closest_marker("gpu") and HAS_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _copies_are_traced(request: pytest.FixtureRequest) -> Iterator[None]:
    is_asked_for = request.config.getoption("--sanitized") == "initcheck"
    with MemcpyTrace() if is_asked_for else contextlib.nullcontext():
        yield


@pytest.fixture
def state() -> Iterator[State]:
    """The plugin's state and outcome in this process, reset before the test and after it.

    A difference that a test planted would end the plugin's fill in all tests after it.
    """
    _reset()
    yield STATE
    _reset()


def _reset() -> None:
    LAST_DRAFT_EXTEND.fill_done = None
    for each in STATES.values():
        each.__init__(each.role)  # type: ignore[misc]
    for outcome in OUTCOMES.values():
        outcome.__init__(outcome.state)  # type: ignore[misc]
    log._lost.clear()


@pytest.fixture
def tile(fill_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many requests an implementation takes at a time; few, for speed, when interpreted."""
    if not fill_backend.interpreted:
        return 128  # Triton's, and half of what a block of the CUDA kernel takes
    monkeypatch.setattr("sglang_nsa_plugin.kernels.triton.TILE", 4)
    monkeypatch.setattr("sglang_nsa_plugin.kernels.triton.COLUMNS", 16)
    return 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-batches",
        type=int,
        metavar="N",
        help="random batches for each implementation and fuzzing test; without it, see test_fuzz.py and "
        "test_kpool.py",
    )

    parser.addoption(
        "--sanitized", metavar="TOOL", help="skip what cannot run in this tool of compute-sanitizer"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning:triton"
    )


# Files whose adapter is another than that of the installed SGLang hold no tests of this release;
# `make test-releases` runs each with the releases that it is for.
OF_GRAPHS = (
    "test_bench_paths.py",
    "test_in_graph.py",
    "test_declined.py",
    "test_ranks.py",
    "test_runner.py",
    "test_service_faults.py",
    "test_shadow_check.py",
    "test_start_faults.py",
    "test_tree_mask.py",
    "test_upstream_changes.py",
    "test_wide_table.py",
)
OF_EAGER = ("test_eager.py",)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.name not in (*OF_GRAPHS, *OF_EAGER):
        return None
    from sglang_nsa_plugin.adapters import in_graph

    of_others = OF_EAGER if in_graph.is_generation() else OF_GRAPHS
    return True if collection_path.name in of_others else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        missing = _missing_gpu()
        if missing is not None:
            pytest.skip(missing)
    tool = item.config.getoption("--sanitized")
    for mark in item.iter_markers("unsanitized"):
        if tool is not None and tool in mark.kwargs.get("tools", (tool,)):
            pytest.skip(f"not under compute-sanitizer: {mark.args[0]}")


def _missing_gpu() -> str | None:
    if not torch.backends.cuda.is_built():
        return f"needs an NVIDIA GPU: torch {torch.__version__} is built without CUDA"
    if not HAS_GPU:
        return "needs an NVIDIA GPU: torch.cuda.is_available() is False"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"needs sm_90 or newer: the GPU is a {torch.cuda.get_device_name()}"
    return None
