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
# What the plugin can fill: the plans of a speculative step, and the one of a server without speculation.
# Users see these names.
DRAFT_EXTEND, DRAFT_DECODE, VERIFY = "draft-extend", "draft-decode", "verify"
DECODE = "decode"
ROLES = (DRAFT_EXTEND, DRAFT_DECODE, VERIFY)
ALL_ROLES = (*ROLES, DECODE)


class ReplayCount:
    """A role's replays whose fill was in the graph.

    An object of its own, and small: counting in the large one of the role's state costs each replay
    two more misses of the CPU's caches.
    """

    __slots__ = ("replays",)

    def __init__(self, replays: int = 0) -> None:
        self.replays = replays


@dataclass(slots=True)
class State:
    """One role's outcome of ``adapters/outcome.py``, mirrored, and its counters of service.

    Attributes:
        role: one of ALL_ROLES.
        adapter: how the fill is hooked into SGLang; None while SGLang fills.
        backend: the implementation; None until SGLang has made this role's attention backend.
        mqa_schedule: who makes DeepGEMM's schedule: the implementation, or "DeepGEMM" where the schedule
            of the installed DeepGEMM is another; None as long as ``backend`` is.
        reason: why this adapter and implementation, or why none.
        switched_on: whether the fill is switched on in service.
        in_place: whether the plugin fills this role's steps; false until start-up is over.
        is_expected: false where the plugin is off, the roles leave this one out, or this rank has
            nothing to fill: no NSA/DSA, no such step, no draft model.
        bytes_saved: of wide page tables that the graphs of this role do without.
        captures: batch sizes whose fill was recorded in a CUDA graph.
        count: counts the replays whose fill was in the graph.
        launches: steps whose fill was one launch from Python.
        fallbacks: steps that SGLang filled although the adapter was active, by reason.
        checks: steps that the shadow check compared with SGLang's own fill.
        values_checked: values that those steps compared, as far as the device has reported.
        mismatches: values that differed in the failing check, which is the last one.
        first_mismatch: the first of them, in words.
        tree_mask: of verify: what is done with its tree mask, in words; None before it was decided.
    """

    role: str = DRAFT_EXTEND
    adapter: str | None = None
    backend: str | None = None
    mqa_schedule: str | None = None
    reason: str = NOT_ASKED
    switched_on: bool = True
    in_place: bool = False
    is_expected: bool = True
    bytes_saved: int = 0
    captures: set[int] = field(default_factory=set)
    count: ReplayCount = field(default_factory=ReplayCount)
    launches: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    values_checked: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None
    tree_mask: str | None = None

    @property
    def replays(self) -> int:
        """Replays whose fill was in the graph."""
        return self.count.replays


STATE = State()
DRAFT_DECODE_STATE = State(DRAFT_DECODE)
VERIFY_STATE = State(VERIFY)
DECODE_STATE = State(DECODE)
STATES = {state.role: state for state in (STATE, DRAFT_DECODE_STATE, VERIFY_STATE, DECODE_STATE)}


def reported() -> list[State]:
    """The states that are shown: draft-extend's, and that of every other role that was asked for."""
    return [state for state in STATES.values() if state is STATE or state.reason != NOT_ASKED]


def record() -> dict[str, Any]:
    """The states as plain values, the way ``/server_info`` shows them.

    What does not lie below ``roles`` is draft-extend's, which ends each speculative step.
    """
    return {
        "version": VERSION,
        **_values_of(STATE),
        "in_place": {state.role: state.in_place for state in reported()},
        "tree_mask": VERIFY_STATE.tree_mask,
        "roles": {state.role: _values_of(state) for state in reported()},
        "pid": os.getpid(),
    }


def _values_of(state: State) -> dict[str, Any]:
    return {
        "adapter": state.adapter,
        "backend": state.backend,
        "mqa_schedule": state.mqa_schedule,
        "reason": state.reason,
        "switched_on": state.switched_on,
        "in_place": state.in_place,
        "bytes_saved": state.bytes_saved,
        "in_graph": bool(state.captures),
        "captures": sorted(state.captures),
        "replays": state.replays,
        "launches": state.launches,
        "fallbacks": dict(state.fallbacks),
        "checks": state.checks,
        "values_checked": state.values_checked,
        "mismatches": state.mismatches,
        "first_mismatch": state.first_mismatch,
    }
