"""What ``/server_info`` shows of this rank, as metrics on SGLang's own ``/metrics``.

A fill only increments plain counters; a thread copies them once a second. SGLang's own statistics
functions run every few dozen decode steps and not while the server is idle, so they would miss the last
steps before a pause. SGLang's HTTP process sums what its schedulers write, in prometheus_client's
multiprocess mode.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import loses
from sglang_nsa_plugin.state import STATE, VERSION, State, reported

PREFIX = "sglang_nsa_plugin:"
PERIOD_S = 1.0
# Fields of State; prometheus_client adds the suffix _total.
COUNTERS = {
    "replays": "Replays whose metadata was filled in the CUDA graph.",
    "launches": "Steps whose metadata was filled from Python, before a graph or without one.",
    "checks": "Steps that the shadow check compared with SGLang's own fill.",
    "mismatches": "Values that differed in the check that found some; SGLang fills from then on.",
}
# Fields of State that go up and down.
GAUGES = {
    "switched_on": "1 while the fill is switched on in service, 0 while SGLang fills instead.",
}


def export(labels: Mapping[str, Any]) -> None:
    """Exposes this rank's states under SGLang's labels; counters only where there is an adapter.

    To be called once a process, after start-up has decided who fills.
    """
    _expose_info(labels)
    in_place = InPlace(labels)
    in_place.copy()
    if all(state.adapter is None for state in reported()):
        return
    copier = Copier(labels)
    copier.copy()
    threading.Thread(
        target=_copy_forever, args=[copier, in_place], name="nsa-metrics", daemon=True
    ).start()


def _expose_info(labels: Mapping[str, Any]) -> None:
    from prometheus_client import Gauge  # reads PROMETHEUS_MULTIPROC_DIR, which SGLang sets

    decided = {
        "version": VERSION,
        "adapter": STATE.adapter or "none",
        "implementation": STATE.backend or "none",
    }
    every = {**labels, **decided}
    info = Gauge(
        f"{PREFIX}info",
        "1; the labels say what fills draft-extend metadata.",
        list(every),
        multiprocess_mode="mostrecent",
    )
    info.labels(**every).set(1)


class InPlace:
    """For each role whose fill is expected, whether the plugin fills its steps."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Gauge

        self._labels = labels
        self._gauge = Gauge(
            f"{PREFIX}in_place",
            "1 where the plugin fills the metadata of this role, 0 where SGLang does.",
            list({**labels, "role": ""}),
            multiprocess_mode="mostrecent",
        )

    def copy(self) -> None:
        """Shows what holds now: a failed shadow check ends a fill that was in place."""
        for state in filter(lambda each: each.is_expected, reported()):
            self._gauge.labels(**{**self._labels, "role": state.role}).set(int(state.in_place))


class Copier:
    """Copies what the states have counted into the metrics, with the role as a label."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Counter as Metric
        from prometheus_client import Gauge

        self._labels = labels
        names = list({**labels, "role": ""})
        self._plain = {name: Metric(PREFIX + name, meaning, names) for name, meaning in COUNTERS.items()}
        self._gauges = {
            name: Gauge(PREFIX + name, meaning, names, multiprocess_mode="mostrecent")
            for name, meaning in GAUGES.items()
        }
        self._fallbacks = Metric(
            f"{PREFIX}fallbacks",
            "Steps that SGLang filled although the adapter was there.",
            [*names, "reason"],
        )
        self._copied: Counter[tuple[str, str]] = Counter()

    def copy(self) -> None:
        """Adds what was counted since the last copy."""
        for state in reported():
            self._copy_role(state)

    def _copy_role(self, state: State) -> None:
        labels = {**self._labels, "role": state.role}
        for name, metric in self._plain.items():
            self._raise((state.role, name), metric.labels(**labels), getattr(state, name))
        for name, gauge in self._gauges.items():
            gauge.labels(**labels).set(getattr(state, name))
        for reason, count in dict(state.fallbacks).items():
            labelled = self._fallbacks.labels(**labels, reason=reason)
            self._raise((state.role, f"fallbacks: {reason}"), labelled, count)

    def _raise(self, key: tuple[str, str], metric: Any, count: int) -> None:
        metric.inc(count - self._copied[key])
        self._copied[key] = count


def _copy_forever(*copiers: Copier | InPlace) -> None:
    while True:
        time.sleep(PERIOD_S)
        for copier in copiers:
            attempt(copier.copy, loses("a copy of the counters to /metrics"))
