"""The switch in service: in the middle of requests, a thousand times under load, on every rank.

    python -m integration.serving.serve_test switch

Every replay that the plugin fills is compared with SGLang's own fill.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from integration.serving import metrics_page
from integration.serving.ab_servers import PLUGIN_ENV, ROLES, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    prompts,
    read_record,
    schedulers_figures,
)
from integration.serving.server import Answer, Server
from integration.serving.test_parallel import TP
from integration.serving.test_shadow_serving import check_every_replay, mixed_load
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.switch import KEY
from sglang_nsa_plugin.metrics import PERIOD_S

CHECKED = {"plugin": {**PLUGIN_ENV, "SGLANG_NSA_METADATA_CHECK": "1"}}
SETUPS = (
    Setup("switch", ("--enable-metrics",), CHECKED),
    Setup("switch-tp2", (*TP, "--enable-metrics"), CHECKED, gpus=2),
)
OFF = FallbackReason.SWITCHED_OFF.value
LIMIT_S = 20.0
NEW_TOKENS = 192
SWITCHES = 1_000
LOAD_S = 5.0  # of mixed load between two looks at the number of switches


def switch(target: Server, value: float) -> list[bool]:
    """SGLang's answer, one for each data-parallel rank."""
    body = {"server_args": {KEY: value}}
    return list(target.request("POST", "/set_internal_state", LIMIT_S, json=body))


class Switching:
    """Switches off and on in turn, as fast as the server answers, in a thread of its own."""

    def __init__(self, target: Server) -> None:
        self.target = target
        self.count = 0
        self.refused = 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            self.refused += switch(self.target, self.count % 2) != [True]
            self.count += 1

    def end(self) -> None:
        self._end.set()


@contextmanager
def switching(target: Server) -> Iterator[Switching]:
    """Switches while the block runs; the fill is on afterwards."""
    each = Switching(target)
    thread = threading.Thread(target=each.run)
    thread.start()
    try:
        yield each
    finally:
        each.end()
        thread.join()
        assert switch(target, 1) == [True]


@pytest.fixture
def target(servers: AbServers) -> Server:
    return servers["plugin"]


def test_tokens_and_drafts_are_the_same_before_in_and_after_a_switch(
    servers: AbServers, target: Server, report: Report
) -> None:
    asked = prompts(SHORT_LENGTHS, seed=111)
    answers: dict[str, list[Answer]] = {}
    for name, value in (("on", 1), ("off", 0), ("on again", 1)):
        assert switch(target, value) == [True]
        answers[name] = answered(target, asked)
    with switching(target) as each:
        answers["switching"] = answered(target, asked)
    same = {
        name: [
            (ours.output_ids, ours.histogram) == (theirs.output_ids, theirs.histogram)
            for ours, theirs in zip(found, answers["off"], strict=True)
        ]
        for name, found in answers.items()
    }
    figures = {"prompts": len(asked), "new_tokens": NEW_TOKENS, "switches": each.count}
    report(
        f"{servers.setup.name}.tokens", figures | {"same": {name: sum(s) for name, s in same.items()}}
    )
    assert each.count > len(asked)
    assert each.refused == 0
    assert all(all(found) for found in same.values()), same


def answered(target: Server, asked: list[list[int]]) -> list[Answer]:
    """One after the other. A prompt whose beginning is cached is computed with other roundings."""
    target.flush_cache()
    return [target.generate(prompt, NEW_TOKENS) for prompt in asked]


def test_a_thousand_switches_under_load(servers: AbServers, target: Server, report: Report) -> None:
    """Nothing differs from SGLang's own fill, no request fails, and all ranks switch alike."""
    before, begin, requests = read_record(target), time.monotonic(), 0
    with switching(target) as each:
        while each.count < SWITCHES:
            requests += mixed_load(target, LOAD_S, seed=each.count)
    ranks = [figures["plugin_record"] for figures in schedulers_figures(servers["plugin"])]
    record = read_record(target)
    found = {"switches": each.count, "requests": requests, "seconds": round(time.monotonic() - begin, 1)}
    report(f"{servers.setup.name}.load", {**found, "record": record, "ranks": ranks})
    assert each.refused == 0
    assert len(ranks) == servers.setup.gpus
    for role in ROLES:
        found = record["roles"][role]
        check_every_replay(role, found, {OFF})
        assert found["replays"] - before["roles"][role]["replays"] > SWITCHES // 2, role
        for name in ("replays", "fallbacks", "checks", "mismatches", "switched_on"):
            assert all(rank["roles"][role][name] == found[name] for rank in ranks), (role, name)


def test_it_shows_in_server_info_metrics_and_one_log_line(
    servers: AbServers, target: Server, report: Report
) -> None:
    said = target.log().count("switched off in service: ")
    shown: dict[int, Any] = {}
    for value in (0, 1):
        assert switch(target, value) == [True]
        time.sleep(2 * PERIOD_S)
        ranks = metrics_page.read(target.url).values()
        shown[value] = read_record(target)["switched_on"], {rank["switched_on"] for rank in ranks}
    refused = {str(value): switch(target, value) for value in (2, -1, 0.5)}
    line = next(line for line in target.log().splitlines() if "is refused" in line)
    figures = {str(value): [in_info, sorted(gauges)] for value, (in_info, gauges) in shown.items()}
    report(f"{servers.setup.name}.shown", {"shown": figures, "refused": refused, "line": line})
    assert shown == {value: (bool(value), {value}) for value in (0, 1)}
    assert list(refused.values()) == [[False]] * 3
    assert target.log().count("switched off in service: ") > said
