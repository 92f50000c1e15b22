"""Another plugin patched the scheduler's constructor first: what serves, what ends, what is logged.

By default the server serves with SGLang's own fill and says why. A backend that was asked for by name
ends the start.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.serving.ab_servers import (
    MANY,
    PLUGIN_ENV,
    PROBE,
    SGLANG_ENV,
    START_LIMIT_S,
    AbServers,
    Setup,
    python_path,
)
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    mismatches,
    one_at_a_time,
    prompts,
    read_record,
    summary,
)
from integration.serving.server import Server, ServerError

FIRST = Path(__file__).parent / "first_plugin"
PATH = python_path(FIRST, PROBE)
PATCHED = {**PLUGIN_ENV, "PYTHONPATH": PATH}
SETUP = Setup("other-plugin", MANY, environments={"plugin": PATCHED, "sglang": SGLANG_ENV})
SETUPS = (SETUP,)
INIT = "sglang.srt.managers.scheduler.Scheduler.__init__"
WHY = f"another plugin (first) patched {INIT} before"
BY_NAME = ("--nsa-metadata-backend", "cuda")


def test_auto_serves_with_sglangs_own_fill_and_says_why(servers: AbServers, report: Report) -> None:
    rows = one_at_a_time(servers, prompts(SHORT_LENGTHS, seed=81))
    record, lines = read_record(servers["plugin"]), operators_lines(servers["plugin"])
    report("other-plugin.auto", {**summary(rows), "record": record, "lines": lines})
    assert mismatches(rows) == []
    assert not any(record["in_place"].values()), record["in_place"]
    assert record["reason"].startswith(WHY)
    assert record["replays"] == record["launches"] == 0
    # SGLang's logger is set up by then: time and rank are in front
    assert any(line.startswith("[") and f"not used: {WHY}" in line for line in lines)


def test_a_backend_by_name_ends_the_start(model: Path, folder: Path, report: Report) -> None:
    flags = ["--model-path", str(model), *SETUP.args, *BY_NAME]
    log_path = folder / "other-plugin" / "by-name.log"
    with Server(flags, PATCHED, log_path=log_path, name="by-name") as server:
        with pytest.raises(ServerError, match=r"ended with exit code [^0]"):
            server.wait_ready(START_LIMIT_S)
        lines = operators_lines(server)
    report("other-plugin.by_name", {"flags": " ".join(BY_NAME), "lines": lines})
    assert any("nsa-metadata-backend cuda" in line and WHY in line for line in lines)


def operators_lines(server: Server) -> list[str]:
    """What the log says of the plugin, without SGLang's lines on each hook."""
    named = [
        line for line in server.log().splitlines() if "nsa-metadata" in line or "nsa-plugin" in line
    ]
    return [line for line in named if "Applied " not in line]
