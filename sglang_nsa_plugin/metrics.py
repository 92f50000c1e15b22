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
from sglang_nsa_plugin.state import STATE, VERSION

PREFIX = "sglang_nsa_plugin:"
PERIOD_S = 1.0
# Fields of State; prometheus_client adds the suffix _total.
COUNTERS = {
    "replays": "Draft-extend replays whose metadata was filled in the CUDA graph.",
    "launches": "Draft-extend steps whose metadata was filled by one launch from Python.",
    "checks": "Steps that the shadow check compared with SGLang's own fill.",
    "mismatches": "Values that differed in the check that found some; SGLang fills from then on.",
}


# Fields of State that go up and down.
GAUGES = {
    "switched_on": "1 while the fill is switched on in service, 0 while SGLang fills instead.",
}


def export(labels: Mapping[str, Any]) -> None:
    """Exposes this rank's state under SGLang's labels; counters only where there is an adapter.

    To be called once a process, after start-up has decided who fills.
    """
    _expose_info(labels)
    in_place = InPlace(labels)
    in_place.copy()
    if STATE.adapter is None:
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
    """For each role, whether the plugin fills its steps."""

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
        for role, is_in_place in STATE.in_place.items():
            self._gauge.labels(**{**self._labels, "role": role}).set(int(is_in_place))


class Copier:
    """Copies what the state has counted into the metrics."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Counter as Metric
        from prometheus_client import Gauge

        self._labels = labels
        self._plain = {
            name: Metric(PREFIX + name, meaning, list(labels)).labels(**labels)
            for name, meaning in COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(PREFIX + name, meaning, list(labels), multiprocess_mode="mostrecent").labels(
                **labels
            )
            for name, meaning in GAUGES.items()
        }
        self._fallbacks = Metric(
            f"{PREFIX}fallbacks",
            "Draft-extend steps that SGLang filled although the adapter was there.",
            list({**labels, "reason": ""}),
        )
        self._copied: Counter[str] = Counter()

    def copy(self) -> None:
        """Adds what was counted since the last copy."""
        for name, metric in self._plain.items():
            self._raise(name, metric, getattr(STATE, name))
        for name, gauge in self._gauges.items():
            gauge.set(getattr(STATE, name))
        for reason, count in dict(STATE.fallbacks).items():
            labelled = self._fallbacks.labels(**{**self._labels, "reason": reason})
            self._raise(f"fallbacks: {reason}", labelled, count)

    def _raise(self, name: str, metric: Any, count: int) -> None:
        metric.inc(count - self._copied[name])
        self._copied[name] = count


def _copy_forever(*copiers: Copier | InPlace) -> None:
    while True:
        time.sleep(PERIOD_S)
        for copier in copiers:
            attempt(copier.copy, loses("a copy of the counters to /metrics"))
