"""Options, the two running servers and the result file of the serving tests.

Environment: NSA_RESULTS_DIR for the result file, NSA_LOG_DIR to keep the servers' logs and the
probe's files, NSA_COMMIT where there is no git repository.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import results
import server

COMMAND = "make serve-test"
PRINTED = 600  # characters of each part


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fence", action="store_true", help="also measure the cost of a coarse fence")
    parser.addoption("--load-s", type=float, default=60.0, help="seconds of load under the shadow check")
    parser.addoption("--budget-s", type=float, default=480.0, help="seconds for all of it")


def pytest_configure(config: pytest.Config) -> None:
    # Without this a SIGTERM would end pytest at once and leave servers behind on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", returncode=143))


@pytest.fixture(scope="session")
def report() -> Callable[[str, dict[str, Any]], None]:
    """Writes each part into ``serve-VERSION.json`` as soon as it is known."""
    file = f"serve-{version('sglang')}.json"
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(part: str, figures: dict[str, Any]) -> None:
        results.merge(file, COMMAND, {part: {"run": run, **figures}})
        print(f"\n{part}: {json.dumps(figures)[:PRINTED]}")

    return add


@pytest.fixture(scope="session")
def begin() -> float:
    return time.monotonic()


@pytest.fixture(autouse=True)
def _within_budget(begin: float, request: pytest.FixtureRequest) -> None:
    spent, budget = time.monotonic() - begin, request.config.getoption("--budget-s")
    if spent > budget:
        pytest.fail(f"not begun: {spent:.0f} of {budget:.0f} s (--budget-s) are spent")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For logs and probe files; a new folder in each session."""
    kept = os.environ.get("NSA_LOG_DIR")
    if not kept:
        return tmp_path_factory.mktemp("serving")
    path = Path(kept) / time.strftime("%Y%m%d-%H%M%S")
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def arms(
    begin: float, model: Path, folder: Path, report: Callable[[str, dict[str, Any]], None]
) -> Iterator[dict[str, server.Arm]]:
    """Two servers on one GPU, started together: with the plugin and as SGLang is."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU: nvidia-smi is not on PATH")
    with server.start_arms(server.ARMS, model, folder, server.START_LIMIT_S) as running:
        started = {
            name: {
                "ready_after_s": round(arm.server.ready_after_s or 0.0, 1),
                "command": " ".join(["python3", *arm.server.command[1:]]).replace(str(model), "MODEL"),
                "environment": server.ARMS[name],
            }
            for name, arm in running.items()
        }
        report("start", started)
        yield running
