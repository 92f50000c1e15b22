"""Rows of a comparison of both servers, as `compare` writes them into result files; needs no server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any

SIDES = ("plugin", "sglang")
GPU_GROWTH_MIB = 256  # of the last third of a load over the third before: more is no noise
Row = dict[str, Any]


def mismatched(row: Row) -> bool:
    """Whether tokens or the reason to finish differ, or the drafts where SGLang is repeatable."""
    same_answer = row["same_ids"] and row["same_finish"]
    return not same_answer or (row["deterministic"] and not row["same_drafts"])


def accepted_drafts(rows: Iterable[Row]) -> dict[str, list[int]]:
    """How many steps of each server accepted 0, 1, … drafts, over all rows."""
    rows = list(rows)
    return {server: total(row["accepted_drafts"][server] for row in rows) for server in SIDES}


def total(counts: Iterable[Sequence[int]]) -> list[int]:
    """The elementwise sum of all."""
    nothing: list[int] = []
    return reduce(added, counts, nothing)


def added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Elementwise sum; the shorter one ends in zeros."""
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


def mean_tokens(accepted_drafts: Sequence[int]) -> float:
    """Tokens of a step: accepted drafts and one of the target's own; 0 without steps."""
    steps = sum(accepted_drafts)
    tokens = sum((drafts + 1) * count for drafts, count in enumerate(accepted_drafts))
    return round(tokens / steps, 4) if steps else 0.0
