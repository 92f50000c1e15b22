"""48 clients on each server, for minutes: nothing fails or hangs, memory stays, drafts are accepted.

    python -m integration.serving.serve_test load [-- --load-s 120]
    python -m integration.serving.serve_test load-checked load-6-drafts

Both servers are loaded alike at the same time. A wrong length makes a kernel wait forever instead of
failing, so each request has a limit, after which its server counts as broken. In the second and third
setup every replay is shadow-checked.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil
import pytest

from integration.releases.differences import decode_graphs
from integration.serving.ab_servers import (
    NO_PROBE,
    PLUGIN_ENV,
    ROLES,
    SGLANG_ENV,
    AbServer,
    AbServers,
    Environment,
    Setup,
)
from integration.serving.ab_stats import GPU_GROWTH_MIB, added, mean_tokens
from integration.serving.compare import Report, gpu_memory_mib, prompts, read_record, relative
from integration.serving.server import Server, ServerError
from integration.serving.test_shadow_serving import CHECKED as CHECKED_ENV
from integration.serving.test_shadow_serving import check_every_replay

# Few sizes: most batches are padded, and the server starts sooner.
GRAPHS = tuple(decode_graphs(48, (1, 2, 4, 8, 16, 32, 48)))
SGLANG: Environment = {**SGLANG_ENV, **NO_PROBE}
CHECKED = {"plugin": {**CHECKED_ENV, **NO_PROBE}, "sglang": SGLANG}
SETUPS = (
    Setup("load", GRAPHS, {"plugin": {**PLUGIN_ENV, **NO_PROBE}, "sglang": SGLANG}),
    Setup("load-checked", GRAPHS, CHECKED),
    Setup("load-6-drafts", GRAPHS, CHECKED, draft_tokens=6),
)
# The start of the servers counts: it takes minutes where SGLang has compiled nothing yet.
pytestmark = pytest.mark.timeout(1_200)
CLIENTS = 48
HANG_S = 40.0  # the slowest request takes a few seconds
NEW_TOKENS = (16, 64, 192, 400)
LONGEST = 1_600
SHARED = prompts([500] * 4, seed=91)  # beginnings that some requests have in common
SAMPLE_EVERY_S = 5.0
APART_LIMIT = 0.01
HOST_GROWTH_MIB = 128


@dataclass
class Load:
    """What the clients of one server have seen."""

    requests: Counter[str] = field(default_factory=Counter)
    accepted: list[int] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def test_mixed_load(servers: AbServers, report: Report, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--load-s")
    loads = {name: Load() for name in servers}
    deadline = time.monotonic() + seconds
    clients = [
        threading.Thread(target=client, args=(server, loads[name], number, deadline), daemon=True)
        for name, server in servers.items()
        for number in range(CLIENTS)
    ]
    for each in clients:
        each.start()
    samples = []
    while time.monotonic() < deadline and not any(load.errors for load in loads.values()):
        samples.append(memory(servers))
        time.sleep(SAMPLE_EVERY_S)
    for each in clients:
        each.join(HANG_S + 10)
    tokens_per_step = {name: mean_tokens(load.accepted) for name, load in loads.items()}
    apart = relative(**tokens_per_step) if all(tokens_per_step.values()) else 1.0
    record = {} if servers["plugin"].broken else read_record(servers["plugin"])
    # A sample of the host can hold gigabytes of a process that comes and goes, also without the plugin.
    grown = {
        "gpu": growth(samples, "gpu", max),
        **{name: growth(samples, name, statistics.median_low) for name in servers},
    }
    figures = {
        "seconds": seconds,
        "clients": CLIENTS,
        "requests": {name: dict(load.requests) for name, load in loads.items()},
        "new_tokens": {name: load.tokens for name, load in loads.items()},
        "tokens_per_step": tokens_per_step,
        "memory_mib": {"grown": grown, "first": samples[0], "last": samples[-1]},
        "errors": {name: load.errors[:3] for name, load in loads.items()},
        "record": record,
    }
    report(servers.setup.name, figures)
    assert [each for each in clients if each.is_alive()] == []
    assert all(load.errors == [] for load in loads.values())
    assert apart < APART_LIMIT
    # much less is no better: one of the two servers has ended, and would hide growth
    assert abs(grown["gpu"]) < GPU_GROWTH_MIB
    assert grown["plugin"] < grown["sglang"] + HOST_GROWTH_MIB
    assert record["fallbacks"] == {}
    assert record["replays"] + record["launches"] > seconds
    if servers.setup.environments is CHECKED:
        for role in ROLES:
            check_every_replay(role, record["roles"][role])


def client(target: Server, load: Load, number: int, deadline: float) -> None:
    """Requests of one client, one after the other; the same in both servers."""
    source = random.Random(number)
    while time.monotonic() < deadline and target.broken is None:
        prompt, new_tokens = draw(source)
        try:
            answer = target.generate(prompt, new_tokens, limit_s=HANG_S)
        except ServerError as error:
            with load.lock:
                load.errors.append(str(error))
            return
        with load.lock:
            load.requests["answered"] += 1
            load.requests["cached"] += bool(answer.meta.get("cached_tokens"))
            load.tokens += len(answer.output_ids)
            load.accepted = added(load.accepted, answer.histogram)
            if len(answer.output_ids) != new_tokens:
                load.errors.append(f"{len(answer.output_ids)} of {new_tokens} tokens: {answer.meta}")


def draw(source: random.Random) -> tuple[list[int], int]:
    """A prompt, mostly short and now and then with a common beginning, and a number of new tokens."""
    length = int(LONGEST ** source.random())
    (prompt,) = prompts([length], seed=source.randrange(1 << 30))
    if source.random() < 0.25:
        prompt = source.choice(SHARED) + prompt[:300]
    return prompt, source.choice(NEW_TOKENS)


def memory(servers: AbServers) -> dict[str, int]:
    """MiB in use: of the GPU by both servers together, and of the host by each one's processes."""
    resident = {name: resident_mib(server) for name, server in servers.items()}
    return {"gpu": gpu_memory_mib(servers.values()), **resident}


def resident_mib(server: AbServer) -> int:
    process = server.process
    assert process is not None
    try:
        tree = psutil.Process(process.pid)
        sizes = [each.memory_info().rss for each in (tree, *tree.children(recursive=True))]
    except psutil.NoSuchProcess:  # the server has just ended; its clients say so
        return 0
    return int(sum(sizes)) >> 20


def growth(samples: list[dict[str, int]], name: str, value: Callable[[Iterable[int]], int]) -> int:
    """How far the ``value`` of the last third is above that of the third before."""
    third = max(1, len(samples) // 3)
    last, before = samples[-third:], samples[-2 * third : -third] or samples[-third:]
    return value(sample[name] for sample in last) - value(sample[name] for sample in before)
