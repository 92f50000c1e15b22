"""What is launched for metadata between the graphs of a step, by a profile of a running server.

    python -m integration.serving.serve_test profile

SGLang launches several GPU operations before each replay of its three graphs; the plugin launches none
for metadata. While the GPU is busy with the step before, it launches one empty kernel before verify's
graph (docs/kernel.md).
The profile covers steps of one request and of 16 at once, without a prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from integration.serving import trace
from integration.serving.ab_servers import ALL_ROLES_ENV, MANY, ROLES, SGLANG_ENV, AbServers, Setup
from integration.serving.compare import Report, needs_graphs, prompts, read_record
from integration.serving.server import Server
from sglang_nsa_plugin.state import VERIFY

MARKED = {"NSA_PROBE_MARK": "1"}
SETUPS = (
    Setup(
        "profile",
        MANY,
        {"plugin": {**ALL_ROLES_ENV, **MARKED}, "sglang": {**SGLANG_ENV, **MARKED}},
    ),
)
AT_ONCE = (1, 16)
NEW_TOKENS = 6_000  # some seconds of steps
DECODING_S = 1.0  # after the request was sent: the prefill is over
STEPS = 12
RECORDED: dict[str, Any] = {"activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
LIMIT_S = 60.0
NO_OP = "no_op_kernel"  # csrc/no_op.cu
LEAST_CALLS = 5  # of each role: the first and the last step may be cut


@pytest.mark.parametrize("count", AT_ONCE)
def test_nothing_is_launched_for_metadata_between_graphs(
    servers: AbServers, report: Report, folder: Path, count: int
) -> None:
    needs_graphs(servers)
    found = {
        name: profiled(server, folder / f"profile-{name}-{count}", count)
        for name, server in servers.items()
    }
    report(f"profile.{count}", found)
    assert read_record(servers["plugin"])["in_place"] == dict.fromkeys(ROLES, True)
    for role in ROLES:
        ours, theirs = (found[name]["roles"][role] for name in ("plugin", "sglang"))
        assert ours["calls"] >= LEAST_CALLS, role
        no_ops, others = split_no_ops(ours["operations"])
        assert not others
        assert no_ops <= (ours["calls"] if role == VERIFY else 0)
        assert theirs["launches"] >= theirs["calls"] >= LEAST_CALLS, role
    assert found["plugin"]["unmarked"] == {}
    assert found["plugin"]["graph_launches"] >= LEAST_CALLS * len(ROLES)


def split_no_ops(operations: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """How often the empty kernel was launched, and what else was."""
    others = {name: count for name, count in operations.items() if NO_OP not in name}
    return sum(count for name, count in operations.items() if NO_OP in name), others


def profiled(server: Server, folder: Path, count: int) -> dict[str, Any]:
    """What the profile of some steps says, while ``count`` requests are being decoded."""
    folder.mkdir(parents=True)
    asked = prompts([64] * count, seed=count)
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(server.generate_batch, asked, [NEW_TOKENS] * count, limit_s=LIMIT_S)
        time.sleep(DECODING_S)
        body = {**RECORDED, "output_dir": str(folder.resolve()), "num_steps": STEPS}
        reply = server.send("POST", "/start_profile", LIMIT_S, json=body)
        assert reply.ok, reply.text
        events = until(lambda: trace.read(folder), f"{server.name}: no profile in {folder}")
        decoding.result()
    return trace.metadata_launches(events)


def until(ask: Callable[[], Any], what: str) -> Any:
    """The first answer that is not None."""
    deadline = time.monotonic() + LIMIT_S
    while (answer := ask()) is None:
        assert time.monotonic() < deadline, f"{what} within {LIMIT_S:.0f} s"
        time.sleep(0.5)
    return answer
