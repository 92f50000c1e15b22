"""What a profile of a running server says about the GPU operations that are launched between its graphs.

The probe (``probe/``) marks each call in which SGLang prepares the metadata of a replay. An operation of
the GPU counts for a mark where the host's call that launched it lies inside, and launches no graph.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "nsa-probe metadata "  # then the role
HOST_CALLS = ("cuda_runtime", "cuda_driver")
GPU_OPERATIONS = ("kernel", "gpu_memcpy", "gpu_memset")
GRAPH_LAUNCH = "GraphLaunch"
# Names of kernels that make metadata, in any release from 0.5.15 on. None of them is launched for
# something else in a step; the part of a name that all releases share is enough.
METADATA_KERNELS = (
    "target_verify_metadata",
    "dsa_decode_metadata",
    "draft_extend_metadata",
    "fused_metadata_copy",
    "paged_mqa_logits_metadata",
    "topk_plan",
    "get_mla_metadata",
    "fill_static_kernel",  # of the plugin
)

Event = Mapping[str, Any]


def read(folder: Path) -> list[Event] | None:
    """The events of the one trace in this folder; None as long as it is not written to its end."""
    files = list(folder.glob("*.trace.json.gz"))
    if not files:
        return None
    (file,) = files
    try:
        with gzip.open(file, "rt") as text:
            events: list[Event] = json.load(text)["traceEvents"]
    except (EOFError, json.JSONDecodeError):
        return None
    return events


def metadata_launches(events: Sequence[Event]) -> dict[str, Any]:
    """By role, how often metadata was prepared and what was launched for it; and what else was, by name.

    Returns:
        graph_launches: of all graphs.
        roles: by role, ``calls``, ``launches`` (GPU operations in all of them), ``operations`` (the same
            by name) and ``gpu_us`` (their time on the GPU).
        unmarked: GPU operations outside of graphs and marks whose kernel is one of METADATA_KERNELS.
    """
    calls = {e["args"]["correlation"]: e for e in events if is_host_call(e)}
    marks = {role: spans(events, role) for role in marked_roles(events)}
    found = {role: _nothing(len(each)) for role, each in marks.items()}
    unmarked: Counter[str] = Counter()
    for operation in launched_alone(events, calls):
        at = calls[operation["args"]["correlation"]]["ts"]
        role = next((role for role, each in marks.items() if is_inside(at, each)), None)
        name = str(operation["name"])
        if role is not None:
            found[role]["operations"][name] += 1
            found[role]["gpu_us"] += operation["dur"]
        elif any(part in name for part in METADATA_KERNELS):
            unmarked[name] += 1
    return {
        "graph_launches": sum(GRAPH_LAUNCH in call["name"] for call in calls.values()),
        "roles": {role: _summed(each) for role, each in found.items()},
        "unmarked": dict(unmarked),
    }


def is_host_call(event: Event) -> bool:
    """Whether this is a call of CUDA's that may have launched something."""
    return event.get("cat") in HOST_CALLS and "correlation" in event.get("args", {})


def marked_roles(events: Sequence[Event]) -> list[str]:
    """The roles that the probe has marked."""
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name.removeprefix(MARK) for name in names if name.startswith(MARK))


def spans(events: Sequence[Event], role: str) -> list[tuple[float, float]]:
    """Begin and end of this role's marks on the host, in their order."""
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == MARK + role
    )


def is_inside(at: float, ordered: Sequence[tuple[float, float]]) -> bool:
    """Whether this moment lies in one of the spans, which do not overlap."""
    number = bisect_right(ordered, (at, float("inf")))
    return number > 0 and at <= ordered[number - 1][1]


def launched_alone(events: Sequence[Event], calls: Mapping[int, Event]) -> Iterator[Event]:
    """GPU operations that the host launched outside of a graph."""
    for event in events:
        if event.get("cat") in GPU_OPERATIONS:
            call = calls.get(event.get("args", {}).get("correlation"))
            if call is not None and GRAPH_LAUNCH not in call["name"]:
                yield event


def _nothing(calls: int) -> dict[str, Any]:
    return {"calls": calls, "operations": Counter(), "gpu_us": 0.0}


def _summed(found: Mapping[str, Any]) -> dict[str, Any]:
    operations = dict(found["operations"].most_common())
    return {
        "calls": found["calls"],
        "launches": sum(operations.values()),
        "operations": operations,
        "gpu_us": round(found["gpu_us"], 1),
    }
