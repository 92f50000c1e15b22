"""What the plugin gains, by switching it inside one running server, cell by cell.

    make serve-test PART=gain ARGS='-k "2-layers-160k-bf16 and not 256"'
    make serve-test PART=gain ARGS='-k "61-layers-1m-bf16 and not 256" --roles draft-extend,verify'

``sglang-nsa-plugin ab`` is run against one server after another, as a user runs it. Each cell is the
plugin switched on ÷ off, its control off ÷ off, and is written to the result file as soon as it is
measured: the regime, the requests, and the roles that the plugin filled name it, so that cells of
draft-extend alone and of the whole step stand side by side. Bounds are reported, not asserted. With
``--check 1`` every fill is shadow-checked, in cells of their own: off ÷ off has no check, so that what
on ÷ off is more there than without is what the checks cost. With SGLANG_ENABLE_METADATA_GLUE_GRAPH=1
cells are kept apart, too.
The servers keep SGLang's wide page tables: without them SGLang's own fill, which is what off
measures, is quicker than in a server without the plugin. ``gain_cells.py`` has the cells.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from integration import result_files
from integration.serving.ab_servers import NO_PROBE, PLUGIN_ENV, START_LIMIT_S, Environment
from integration.serving.gain_cells import REGIMES, Cell, Regime
from integration.serving.server import Server
from sglang_nsa_plugin.options import CHECK_VARIABLE, KEEP, ROLES_VARIABLE, WIDE_VARIABLE

COMMAND = "make serve-test PART=gain"
RESOLVED, NOT_RESOLVED = 0, 1  # exit codes of ab: some cells are, or none
LIMIT_S = 360.0  # of a cell
# SGLang's own way to launch a plan as one graph, from 0.5.19 on: another baseline.
GLUE = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"
KEPT = ("sglang", "plugin", "adapter", "implementation", "ranks", "settings", "seconds")


def keep(part: str, figures: dict[str, Any]) -> None:
    """Each GPU has a result file, gain-GPU-VERSION.json."""
    file = f"gain-{result_files.gpu_name()}-{version('sglang')}.json"
    result_files.merge(file, COMMAND, {part: figures}, alone=True)


def environment(roles: str | None) -> Environment:
    """Of a server that fills these roles; None leaves the choice to the plugin."""
    return {**PLUGIN_ENV, **NO_PROBE, ROLES_VARIABLE: roles}


@pytest.fixture(scope="module")
def variables(roles: str | None, check: int, wide_tables: str) -> Environment:
    """Of every server of this run."""
    checked = {CHECK_VARIABLE: str(check) if check else None}
    return {**environment(roles), **checked, WIDE_VARIABLE: wide_tables}


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, gpus: int, model: Path, folder: Path, variables: Environment
) -> Iterator[Server]:
    """One server of a regime, with nothing else on the GPU, for all cells of it that are asked for."""
    regime: Regime = request.param
    if not gpus:
        pytest.skip("needs an NVIDIA GPU, nvidia-smi lists none")
    args = ["--model-path", str(model), *regime.args]
    log_path = folder / f"{regime.name}-{regime.requests[-1]}.log"
    with Server(args, variables, log_path=log_path, name=regime.name) as running:
        running.wait_ready(START_LIMIT_S)
        print(f"\n{regime.name}: ready after {running.ready_after_s:.0f} s", flush=True)
        yield running


CELLS = [cell for regime in REGIMES for cell in regime.cells]


@pytest.mark.parametrize(
    ("server", "cell"),
    [pytest.param(cell.regime, cell, id=cell.name) for cell in CELLS],
    indirect=["server"],
    scope="module",
)
def test_gain(
    server: Server, cell: Cell, folder: Path, roles: str | None, check: int, wide_tables: str
) -> None:
    """Every cell has its control beside it; a cell whose control is off says that it is not resolved."""
    begin = time.monotonic()
    with beside(cell.beside):
        found = compare(server, cell, folder / f"{cell.name}.json")
    (measured,) = found["cells"]
    measured.pop("every_round", None)  # the medians and ranges are kept
    is_bounded = wide_tables == KEEP and not check
    measured["bound"] = cell.bound(found["roles"], measured) if is_bounded else None
    figures = {
        "regime": cell.regime.name,
        "roles": found["roles"],
        "check": check,
        "wide_tables": wide_tables,
        "variables": {GLUE: os.environ[GLUE]} if os.environ.get(GLUE) else {},
        "beside": cell.beside,
        **{name: found[name] for name in KEPT},
        "cell": measured,
    }
    keep(cell.part(found["roles"], suffixes(figures)), figures)
    said = {True: "met", False: "not met", None: "not resolved"}
    bound = measured["bound"]
    against = f"; at most {bound['at_most']:.2f}: {said[bound['met']]}" if bound else ""
    print(f"{cell.name}, {time.monotonic() - begin:.0f} s: {measured['verdict']}{against}", flush=True)
    assert measured["load"] == str(cell.requests)
    assert measured["verdict"]
    assert roles is None or set(found["roles"]) == set(roles.split(",")), found["roles"]


def suffixes(figures: dict[str, Any]) -> list[str]:
    """What else tells a cell from others of the same requests and roles."""
    wide = ["wide-tables-kept"] if figures["wide_tables"] == KEEP else []
    checked = [f"check-{figures['check']}"] if figures["check"] else []
    return [*wide, *checked, *(["glue-graph"] if figures["variables"] else [])]


def beside(what: str | None) -> contextlib.AbstractContextManager[None]:
    """A process that does this on the same GPU while the block runs; None for none."""
    if what is None:
        return contextlib.nullcontext()
    from integration.gpu import node_gaps  # needs Triton

    return node_gaps.beside(what)


def compare(server: Server, cell: Cell, file: Path) -> dict[str, Any]:
    """What ``sglang-nsa-plugin ab`` finds."""
    command = [sys.executable, "-m", "sglang_nsa_plugin", "ab", server.url, *cell.regime.options]
    options = ["--requests", str(cell.requests), "--json", str(file)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    print(f"\n{done.stdout}", flush=True)
    assert done.returncode in (RESOLVED, NOT_RESOLVED), done.stdout + done.stderr
    assert file.is_file(), done.stderr  # the server died or refused: nothing was compared
    return dict(json.loads(file.read_text()))
