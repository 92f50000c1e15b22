"""Shadow-checked replays by the thousands: servers of several draft-token counts under mixed load.

    python -m pytest integration/test_shadow_load.py -v -s [--load-s 390] [--budget-s 520]

All servers share one GPU and compare every replay. The load ends when --load-s are over, or 20 s before
--budget-s are, counted from pytest's start. Each run writes a result file of its own,
shadow-load-VERSION-TIME.json: runs add up.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import results
import server
from server import Server, ServerError
from test_serving import read_record
from test_shadow_serving import CHECKED, mixed_load

FP8 = ("--kv-cache-dtype", "fp8_e4m3")
# The last of an option wins. Four servers start on one GPU at once: each sees the others' memory go.
SHARED = ("--mem-fraction-static", "0.5")
SERVERS = {
    "2 draft tokens": [*server.serve_args(draft_tokens=2), *SHARED],
    "4 draft tokens": [*server.serve_args(draft_tokens=4), *SHARED],
    "6 draft tokens": [*server.serve_args(draft_tokens=6), *SHARED],
    "4 draft tokens, fp8": [*server.serve_args("flashmla_kv"), *SHARED, *FP8],
}
# One request at a time gives most replays a second; the others put padding and many requests in between.
AT_ONCE = (1, 1, 1, 2, 5, 11, 16)
NEW_TOKENS = (32, 192, 768)
STOPPING_S = 20


@pytest.fixture(scope="module")
def found(
    model: Path, folder: Path, begin: float, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """What each server did, or how it ended: one that fails does not stop the others."""
    option = request.config.getoption
    end = min(time.monotonic() + server.START_LIMIT_S + option("--load-s"), begin + option("--budget-s"))
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(
                Server(
                    ["--model-path", str(model), *args],
                    CHECKED,
                    log_path=folder / f"{name}.log",
                    name=name,
                )
            )
            for name, args in SERVERS.items()
        }
        with ThreadPoolExecutor(len(started)) as pool:
            runs = dict(
                zip(started, pool.map(lambda s: _run(s, end, option), started.values()), strict=True)
            )
    _write(runs)
    return runs


def _run(target: Server, end: float, option: Any) -> dict[str, Any]:
    try:
        target.wait_ready(server.START_LIMIT_S)
        seconds = min(option("--load-s"), end - STOPPING_S - time.monotonic())
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
    total = {key: sum(record[key] for record in records) for key in SUMMED}
    total["fallbacks"] = sum(sum(record["fallbacks"].values()) for record in records)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    file = f"shadow-load-{version('sglang')}-{stamp}.json"
    print(f"\n{file}: {total}")
    results.merge(file, "pytest integration/test_shadow_load.py", {"total": total, "servers": runs})


SUMMED = ("replays", "checks", "values_checked", "mismatches")


@pytest.mark.parametrize("name", SERVERS)
def test_every_replay_was_checked_and_equal(found: dict[str, dict[str, Any]], name: str) -> None:
    run = found[name]
    assert "error" not in run, run["error"]
    record = run["record"]
    assert record["adapter"] == "in-graph"
    assert record["checks"] == record["replays"] > 1000
    assert record["values_checked"] > 100 * record["checks"]
    assert record["mismatches"] == 0
    assert record["fallbacks"] == {}
