"""Shadow-checked replays by the thousands: servers of several draft-token counts under mixed load.

    python -m pytest integration/serving/test_shadow_load.py -v -s [--load-s 390] [--budget-s 520]

All servers share one GPU, fill every role and compare every replay. The load ends when --load-s are
over, or 20 s before --budget-s are, counted from pytest's start. Each GPU has a result file,
shadow-load-GPU-VERSION.json.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from integration import result_files
from integration.serving.ab_servers import FP8, MANY, NO_PROBE, ROLES, START_LIMIT_S, Fleet, Setup
from integration.serving.compare import read_record
from integration.serving.server import ServerError
from integration.serving.test_shadow_serving import CHECKED, check_every_replay, mixed_load

COMMAND = "make serve-test PART=shadow-load"
ARM = {"checked": {**CHECKED, **NO_PROBE}}
SETUPS = (
    Setup("checked3", MANY, ARM, draft_tokens=3),
    Setup("checked4", MANY, ARM),
    Setup("checked6", MANY, ARM, draft_tokens=6),
    Setup("checked4-fp8", (*MANY, *FP8), ARM, "flashmla_kv"),
)
# One request at a time gives most replays a second; the others put padding and many requests in between.
AT_ONCE = (1, 1, 1, 2, 5, 11, 16)
NEW_TOKENS = (32, 192, 768)
STOPPING_S = 20
# Of each role, by all servers together, in a load of LONG_S seconds or more.
LEAST_CHECKS, LONG_S = 10_000, 120
SUMMED = ("replays", "checks", "values_checked", "mismatches")


@pytest.fixture(scope="module")
def found(
    gpus: int, model: Path, folder: Path, begin: float, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """What the server of each setup did, or how it ended: one that fails does not stop the others."""
    if not gpus:
        pytest.skip("needs an NVIDIA GPU, nvidia-smi lists none")
    load_s, budget_s = (request.config.getoption(name) for name in ("--load-s", "--budget-s"))
    end = min(time.monotonic() + START_LIMIT_S + load_s, begin + budget_s) - STOPPING_S
    with (
        Fleet(model, folder, SETUPS, at_once=len(SETUPS)) as fleet,
        ThreadPoolExecutor(len(SETUPS)) as pool,
    ):
        runs = list(pool.map(lambda setup: _run(fleet, setup, load_s, end), SETUPS))
        by_name = {setup.name: run for setup, run in zip(SETUPS, runs, strict=True)}
        _write(by_name)  # before the servers end: a host's limit may come while they do
    return by_name


def _run(fleet: Fleet, setup: Setup, load_s: float, end: float) -> dict[str, Any]:
    try:
        servers = fleet.ready(setup)
        target = servers["checked"]
        seconds = min(load_s, end - time.monotonic())
        requests = mixed_load(target, seconds, seed=target.port, at_once=AT_ONCE, new_tokens=NEW_TOKENS)
        record = read_record(target)
    except ServerError as error:
        return {"error": str(error)}
    return {
        "ready_after_s": round(target.ready_after_s or 0.0, 1),
        "load_s": round(seconds, 1),
        "requests": requests,
        "record": record,
    }


def _write(runs: dict[str, dict[str, Any]]) -> None:
    records = [run["record"] for run in runs.values() if "record" in run]
    roles = {role: _total([record["roles"][role] for record in records]) for role in ROLES}
    total = {**_total(records), "roles": roles}
    file = f"shadow-load-{result_files.gpu_name()}-{version('sglang')}.json"
    print(f"\n{file}: {total}")
    result_files.merge(file, COMMAND, {"total": total, "servers": runs})


def _total(records: list[dict[str, Any]]) -> dict[str, int]:
    total = {key: sum(record[key] for record in records) for key in SUMMED}
    return {**total, "fallbacks": sum(sum(record["fallbacks"].values()) for record in records)}


@pytest.mark.parametrize("name", [setup.name for setup in SETUPS])
def test_every_replay_was_checked_and_equal(found: dict[str, dict[str, Any]], name: str) -> None:
    run = found[name]
    assert "error" not in run, run["error"]
    record = run["record"]
    assert record["adapter"] == "in-graph"
    for role in ROLES:
        of_role = record["roles"][role]
        check_every_replay(role, of_role)
        assert of_role["checks"] > 1000, role
        assert of_role["values_checked"] > 100 * of_role["checks"], role


@pytest.mark.parametrize("role", ROLES)
def test_replays_of_each_role_are_enough(
    found: dict[str, dict[str, Any]], role: str, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--load-s") < LONG_S:
        pytest.skip(f"needs --load-s {LONG_S} or more")
    checks = sum(run["record"]["roles"][role]["checks"] for run in found.values() if "record" in run)
    assert checks >= LEAST_CHECKS
