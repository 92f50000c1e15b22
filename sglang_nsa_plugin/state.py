"""What this process reports of itself: a mirror of decisions and counters, never read to decide."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def version_of(distribution: str) -> str:
    """The version in the distribution's dist-info; "unknown" where a source tree runs without one."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


# Read once: a server outlives the files on disk, which an upgrade replaces and an uninstall removes.
VERSION = version_of("sglang-nsa-plugin")

NOT_ASKED = "not asked yet"
DRAFT_EXTEND = "draft-extend"
ROLES = (DRAFT_EXTEND,)


@dataclass
class State:
    """The outcome of ``adapters/outcome.py``, mirrored, and counters of service.

    Attributes:
        adapter: how the fill is hooked into SGLang; None while SGLang fills.
        backend: the implementation; None until SGLang has made its draft-extend backend.
        mqa_schedule: who makes DeepGEMM's schedule: the implementation, or "DeepGEMM" where the schedule
            of the installed DeepGEMM is another; None until SGLang has made its draft-extend backend.
        reason: why this adapter and implementation, or why none.
        switched_on: whether the fill is switched on in service.
        in_place: for each role, whether the plugin fills its steps; false until start-up is over.
        captures: batch sizes whose fill was recorded in a CUDA graph.
        replays: draft-extend replays whose fill was in the graph.
        launches: draft-extend steps whose fill was one launch from Python.
        fallbacks: draft-extend steps that SGLang filled although the adapter was active, by reason.
        checks: steps that the shadow check compared with SGLang's own fill.
        values_checked: values that those steps compared, as far as the device has reported.
        mismatches: values that differed in the failing check, which is the last one.
        first_mismatch: the first of them, in words.
    """

    adapter: str | None = None
    backend: str | None = None
    mqa_schedule: str | None = None
    reason: str = NOT_ASKED
    switched_on: bool = True
    in_place: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(ROLES, False))
    captures: set[int] = field(default_factory=set)
    replays: int = 0
    launches: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    values_checked: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None


STATE = State()


def record() -> dict[str, Any]:
    """The state as plain values, the way ``/server_info`` shows it."""
    return {
        "version": VERSION,
        "adapter": STATE.adapter,
        "backend": STATE.backend,
        "mqa_schedule": STATE.mqa_schedule,
        "reason": STATE.reason,
        "switched_on": STATE.switched_on,
        "in_place": dict(STATE.in_place),
        "in_graph": bool(STATE.captures),
        "captures": sorted(STATE.captures),
        "replays": STATE.replays,
        "launches": STATE.launches,
        "fallbacks": dict(STATE.fallbacks),
        "checks": STATE.checks,
        "values_checked": STATE.values_checked,
        "mismatches": STATE.mismatches,
        "first_mismatch": STATE.first_mismatch,
        "pid": os.getpid(),
    }
