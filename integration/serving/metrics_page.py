"""The plugin's lines on SGLang's ``/metrics``, and what a scheduler's record says they must be."""

from __future__ import annotations

from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "sglang_nsa_plugin:"
COUNTERS = ("replays", "launches", "checks", "mismatches")
LIMIT_S = 30
FIRST = "draft-extend"  # the role that a record's own values are about
FACTS = ("version", "adapter", "implementation")


def read(url: str) -> dict[str, dict[str, Any]]:
    """What the ranks of the server at ``url`` show; it needs ``--enable-metrics``."""
    with requests.Session() as session:
        session.trust_env = False  # a proxy of the environment cannot reach this machine
        reply = session.get(f"{url}/metrics", timeout=LIMIT_S)
    reply.raise_for_status()
    return shown(reply.text)


def shown(text: str) -> dict[str, dict[str, Any]]:
    """What each rank shows: its counters, fallbacks by reason, roles, and the labels of its info metric.

    Ranks are named as their labels name them, such as ``pp_rank=0 tp_rank=1``. Counters of further roles
    lie under the role's name.
    """
    ranks: dict[str, dict[str, Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX):
                continue
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            of_rank = ranks.setdefault(_rank(sample.labels), {"fallbacks": {}})
            role = sample.labels.get("role", FIRST)
            of_role = of_rank
            if role != FIRST and name != "in_place":
                of_role = of_rank.setdefault(role, {"fallbacks": {}})
            if name == "in_place":
                of_rank.setdefault(name, {})[role] = bool(sample.value)
            elif name == "info":
                of_rank["info"] = {fact: sample.labels[fact] for fact in FACTS}
            elif name == "fallbacks":
                of_role["fallbacks"][sample.labels["reason"]] = int(sample.value)
            else:
                of_role[name] = int(sample.value)
    return ranks


def _rank(labels: dict[str, str]) -> str:
    return " ".join(f"{name}={labels[name]}" for name in sorted(labels) if name.endswith("_rank"))


def expected(record: dict[str, Any]) -> dict[str, Any]:
    """What a rank with this record has to show."""
    return {
        **_counted(record),
        **{role: _counted(found) for role, found in record["roles"].items() if role != FIRST},
        "in_place": record["in_place"],
        "info": {
            "version": record["version"],
            "adapter": record["adapter"] or "none",
            "implementation": record["backend"] or "none",
        },
    }


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: record[name] for name in COUNTERS},
        "switched_on": int(record["switched_on"]),
        "fallbacks": record["fallbacks"],
    }
