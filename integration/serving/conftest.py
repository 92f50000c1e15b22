"""Options, the running servers and the result file of the serving tests.

A test file names the servers that its tests use in ``SETUPS``; a test that takes ``servers`` runs once
for each of them. Environment: NSA_RESULTS_DIR for the result file, NSA_LOG_DIR to keep the servers' logs
and the probe's files, NSA_COMMIT where there is no git repository.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from integration import result_files
from integration.serving import checkpoint
from integration.serving.ab_servers import AbServers, Fleet, Setup
from sglang_nsa_plugin.options import KEEP, ROLES_VARIABLE, WIDE_CHOICES

COMMAND = "make serve-test"
PRINTED = 600  # characters of each part


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--load-s", type=float, default=420.0, help="seconds of the slices load and shadow-load"
    )
    parser.addoption(
        "--shadow-s", type=float, default=60.0, help="seconds of load under the shadow check"
    )
    parser.addoption(
        "--budget-s", type=float, default=480.0, help="no test begins after so many seconds"
    )
    parser.addoption(
        "--roles",
        default=os.environ.get(ROLES_VARIABLE) or None,
        help="roles that the servers of the slices gain and first-minute fill, with commas between "
        f"them; default: ${ROLES_VARIABLE}, else what the plugin fills by default",
    )
    parser.addoption(
        "--wide-tables",
        choices=WIDE_CHOICES,
        default=KEEP,
        help="of the servers of slice gain: switched off, only one that keeps them is SGLang as it is",
    )
    parser.addoption(
        "--check", type=int, default=0, help="the servers of slice gain shadow-check every Nth fill"
    )
    parser.addoption("--servers", type=int, default=2, help="servers that run ahead of their tests")


def pytest_configure(config: pytest.Config) -> None:
    # Without this a SIGTERM would end pytest at once and leave servers running on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", returncode=143))


@pytest.fixture(scope="session")
def report() -> Callable[[str, dict[str, Any]], None]:
    """Writes each part into ``serve-VERSION.json`` as soon as it is known."""
    file = f"serve-{version('sglang')}.json"
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(part: str, figures: dict[str, Any]) -> None:
        short = result_files.without_repeats(figures)
        result_files.merge(file, COMMAND, {part: {"run": run, **short}}, alone=True)
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "servers" in metafunc.fixturenames:
        setups = metafunc.module.SETUPS
        metafunc.parametrize(
            "servers", setups, indirect=True, ids=[s.name for s in setups], scope="module"
        )


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many GPUs there are to be used."""
    return len(result_files.of_gpus("name"))


@pytest.fixture(scope="session")
def roles(request: pytest.FixtureRequest) -> str | None:
    """The roles that were asked for; None for those of the plugin's own choice."""
    asked: str | None = request.config.getoption("--roles")
    return asked


@pytest.fixture(scope="session")
def check(request: pytest.FixtureRequest) -> int:
    """Fills from one shadow check to the next; 0 for none."""
    return int(request.config.getoption("--check"))


@pytest.fixture(scope="session")
def wide_tables(request: pytest.FixtureRequest) -> str:
    """One of WIDE_CHOICES."""
    return str(request.config.getoption("--wide-tables"))


@pytest.fixture(scope="session")
def fleet(
    begin: float, gpus: int, model: Path, folder: Path, request: pytest.FixtureRequest
) -> Iterator[Fleet]:
    """Starts the servers of all tests that were collected, in their order."""
    collected: dict[str, Setup] = {}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        setup = parameters.params.get("servers") if parameters else None
        if setup is not None and setup.gpus <= gpus:
            collected.setdefault(setup.name, setup)
    with Fleet(
        model, folder, list(collected.values()), request.config.getoption("--servers")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def servers(
    fleet: Fleet,
    gpus: int,
    model: Path,
    report: Callable[[str, dict[str, Any]], None],
    request: pytest.FixtureRequest,
) -> Iterator[AbServers]:
    """The servers of one setup, started together: by default with the plugin and as SGLang is."""
    setup: Setup = request.param
    if gpus < setup.gpus:
        pytest.skip(f"setup {setup.name} needs {setup.gpus} NVIDIA GPU(s), there are {gpus}")
    try:
        running = fleet.ready(setup)
        report(f"{setup.name}.start", _started(running, model))
        yield running
    finally:
        fleet.done(setup)


def _started(running: AbServers, model: Path) -> dict[str, Any]:
    return {
        name: {
            "ready_after_s": round(server.ready_after_s or 0.0, 1),
            "command": " ".join(["python3", *server.command[1:]]).replace(str(model), "MODEL"),
            "environment": {
                variable: value
                for variable, value in running.setup.environments[name].items()
                if variable != "PYTHONPATH"  # folders of this host
            },
        }
        for name, server in running.items()
    }
