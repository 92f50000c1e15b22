"""``sglang-nsa-plugin ab``: what the plugin gains on a running server, by switching it on and off.

One server and one process, so nothing else differs between the arms. Every cell, which is a number of
requests at once, is warmed up once on and once off, because SGLang compiles for each batch size. Then
each round measures every cell's three arms. After each arm, the plugin's counters must show who filled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sglang_nsa_plugin.cli import files, terminal
from sglang_nsa_plugin.cli.ab import compare, report
from sglang_nsa_plugin.cli.ab.compare import ARMS, ON, Round
from sglang_nsa_plugin.cli.ab.load import (
    Measured,
    NotResolvedError,
    OtherLoad,
    OwnRequests,
    all_steps,
    filled_by_plugin,
)
from sglang_nsa_plugin.cli.ab.server import Record, Server, left_as_found
from sglang_nsa_plugin.state import DRAFT_EXTEND

NOTHING_TO_COMPARE = 2
WARM_UPS = ("off", "on")
LOOKS = 16  # at a server before it is switched: of two replicas each answers some, in turn or by chance
_FOUND_OFF = (
    "The plugin is switched off on this server, and stays so in the end. If you want it on, and no "
    "other ab is running, switch it on afterwards:\n{command}"
)
MOSTLY = 0.9  # of the steps; SGLang fills those of a batch size without a graph


@dataclass
class Settings:
    """The options of one run."""

    requests: Sequence[int]
    input_len: int
    output_len: int
    rounds: int
    load: str
    seconds: float


@dataclass
class Cell:
    """One row of the table: a load, what it has measured, and why it is given up, if it is."""

    title: str
    load: OwnRequests | OtherLoad
    rounds: list[Round]
    why_not: str | None = None

    def result(self) -> dict[str, Any]:
        """The row as plain values, with every round."""
        if self.why_not is not None:
            return {"load": self.title, "resolved": False, "verdict": f"not resolved: {self.why_not}"}
        rounds = [{arm: asdict(turn[arm]) for arm in ARMS} for turn in self.rounds]
        return {"load": self.title, **compare.compared(self.rounds), "every_round": rounds}


def run(server: Server, settings: Settings, json_path: str | None, plot_path: str | None) -> int:
    """Measures and prints; 0 if a cell was resolved, 1 if none was, 2 if nothing can be compared."""
    console = terminal.console()
    files.raise_if_unwritable(json_path, plot_path)
    if plot_path:
        # First, so that a missing matplotlib costs no minutes.
        from sglang_nsa_plugin.cli.ab import plot
    info = server.info()
    why_not = why_not_comparable(info, server)
    if why_not is not None:
        why_not, _, command = why_not.partition("\n")
        terminal.print_verdict(console, why_not, good=False)
        console.print(command, end="\n" if command else "", soft_wrap=True)
        return NOTHING_TO_COMPARE
    begin, described = time.monotonic(), _described(server, info)
    found_on = _switched_on(server)
    if not found_on:
        console.print(_FOUND_OFF.format(command=server.curl(True)), soft_wrap=True)
    cells = _cells(server, settings)
    with left_as_found(server, found_on), terminal.progress(console) as progress:
        _measure(server, settings, cells, progress)
    result = {
        **described,
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - begin, 1),
        "cells": [cell.result() for cell in cells],
    }
    files.write_and_show(
        result,
        json_path,
        lambda: report.show(console, result),
        (lambda: plot.draw(result, Path(plot_path))) if plot_path else None,
    )
    return 0 if any(cell["resolved"] for cell in result["cells"]) else 1


def _switched_on(server: Server) -> bool:
    """Whether the plugin is switched on, before it is switched."""
    looks = [server.records()[0]["switched_on"] for _ in range(LOOKS)]
    return bool(looks[-1])


def why_not_comparable(info: dict[str, Any], server: Server) -> str | None:
    """Why this server has nothing to compare, and what to do; None if it has."""
    url = server.url
    records: list[Record] = [state.get("nsa_metadata") for state in info["internal_states"]]
    if not records or None in records:
        return (
            f"the server at {url} does not load the plugin: /server_info has no nsa_metadata. Install "
            "sglang-nsa-plugin in the server's Python, name nsa in SGLANG_PLUGINS if that is set, and "
            "start the server again. There, sglang-nsa-plugin verify says whether SGLang finds it"
        )
    if not info.get("speculative_algorithm"):
        return (
            f"the server at {url} runs without speculative decoding, and ab compares speculative steps. "
            "Start it with --speculative-algorithm EAGLE and its options"
        )
    if DRAFT_EXTEND not in filled_roles(records):
        return (
            "ab counts the steps of draft-extend, and the plugin does not fill draft-extend on all "
            f"ranks of the server at {url}: {_reasons(records)}"
        )
    shown = [record.get("switched_on") for record in records]
    if None in shown:
        return (
            f"the plugin {records[0]['version']} of the server at {url} cannot be switched in service: "
            "upgrade it there and start the server again"
        )
    if len(set(shown)) > 1:
        return (
            f"the ranks of the server at {url} are switched differently ({json.dumps(shown)}). Switch "
            f"all of them first:\n{server.curl(True)}"
        )
    of_roles = _switched_roles(records)
    if len(set(of_roles.values())) > 1:
        return (
            f"the roles of the server at {url} are switched differently ({json.dumps(of_roles)}), and "
            f"ab switches all of them. Switch all on, or all off, first:\n{server.curl(True)}"
        )
    return None


def _switched_roles(records: list[Record]) -> dict[str, bool]:
    """Of each role that the plugin fills on every rank, as the first rank shows it."""
    first = of_roles(records[0])
    return {role: first[role].get("switched_on", True) for role in filled_roles(records)}


def _cells(server: Server, settings: Settings) -> list[Cell]:
    if settings.load == "external":
        return [Cell("external", OtherLoad(server, settings.seconds), [])]
    sizes = (settings.input_len, settings.output_len)
    return [Cell(str(n), OwnRequests(server, n, *sizes), []) for n in settings.requests]


def _measure(server: Server, settings: Settings, cells: list[Cell], progress: Progress) -> None:
    """Warms up, then fills the rounds of each cell."""
    arms = len(cells) * (len(WARM_UPS) + settings.rounds * len(ARMS))
    bar = progress.add_task("warming up", total=arms)
    switched = Switched(server)

    def measure(cell: Cell, arm: str) -> Measured | None:
        measured = None
        if cell.why_not is None:
            try:
                measured = switched.measured(arm, cell.load.measure)
            except NotResolvedError as error:
                cell.why_not = str(error)
        progress.advance(bar)
        return measured

    for cell in cells:
        for arm in WARM_UPS:
            measure(cell, arm)
    for number in range(settings.rounds):
        progress.update(bar, description=f"round {number + 1} of {settings.rounds}")
        turn = number % len(ARMS)
        for cell in cells:
            measured = {arm: measure(cell, arm) for arm in (*ARMS[turn:], *ARMS[:turn])}
            cell.rounds.append({arm: each for arm, each in measured.items() if each is not None})


class Switched:
    """Measures with the switch on or off, and looks who filled."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def measured(self, arm: str, measure: Callable[[], Measured]) -> Measured:
        """One arm.

        Raises:
            NotResolvedError: the plugin filled steps of an off arm, or too few of an on arm.
        """
        self.server.switch(arm == ON)
        before = self.server.records()
        measured = measure()
        ranks = list(zip(before, self.server.records(), strict=True))
        steps = max(_since(all_steps, begin, after) for begin, after in ranks)
        for role in filled_roles(before):
            of_role = [(of_roles(begin)[role], of_roles(after)[role]) for begin, after in ranks]
            fills = max(_since(filled_by_plugin, begin, after) for begin, after in of_role)
            _raise_if_other(arm, role, fills, steps)
        return measured


def of_roles(record: Record) -> dict[str, Record]:
    """A rank's record by role; that of a plugin from before there were several is draft-extend's."""
    roles: dict[str, Record] = record.get("roles") or {DRAFT_EXTEND: record}
    return roles


def filled_roles(ranks: list[Record]) -> list[str]:
    """The roles that the plugin fills on every rank."""
    of_ranks = [of_roles(record) for record in ranks]
    return [
        role
        for role in of_ranks[0]
        if all(role in roles and _is_filled(roles[role]) for roles in of_ranks)
    ]


def _is_filled(of_role: Record) -> bool:
    return of_role.get("adapter", "") is not None and bool(of_role.get("in_place", True))


def _reasons(ranks: list[Record]) -> str:
    """Why ranks do not fill draft-extend, each reason once."""
    found = [of_roles(record).get(DRAFT_EXTEND, record) for record in ranks]
    idle = [record for record in found if not _is_filled(record)]
    return "; ".join(dict.fromkeys(each.get("first_mismatch") or each["reason"] for each in idle))


def _since(count: Callable[[Record], int], begin: Record, after: Record) -> int:
    return count(after) - count(begin)


def _raise_if_other(arm: str, role: str, fills: int, steps: int) -> None:
    """The busiest rank's fills by the plugin, of all its steps, must be those of this arm."""
    if arm == ON and fills < MOSTLY * steps:
        raise NotResolvedError(
            f"the plugin filled {role} in {fills} of {steps} steps while it was on: /server_info counts "
            "why, under fallbacks. If that is only 'switched off in service', somebody else switches it"
        )
    if arm != ON and fills > 0:
        raise NotResolvedError(
            f"the plugin filled {role} in {fills} of {steps} steps while it was off: does somebody else "
            "switch it?"
        )


def _described(server: Server, info: dict[str, Any]) -> dict[str, Any]:
    records = [state["nsa_metadata"] for state in info["internal_states"]]
    first = records[0]
    return {
        "url": server.url,
        "sglang": info.get("version"),
        "plugin": first["version"],
        "adapter": first["adapter"],
        "implementation": first["backend"],
        "roles": filled_roles(records),
        "ranks": len(records),
    }
