"""Rows of a comparison of both servers, as `compare` writes them into result files; needs no server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import combinations, takewhile, zip_longest
from typing import Any

SIDES = ("plugin", "sglang")
GPU_GROWTH_MIB = 256  # of the last third of a load over the third before: more is no noise
Row = dict[str, Any]


ITSELF, FAULT = "SGLang alone differs from itself", "fault"


def verdict(plugin: Sequence[Sequence[int]], sglang: Sequence[Sequence[int]]) -> str:
    """Why the plugin's answers to a prompt are not among SGLang's.

    SGLang alone explains it where its own answers part, and each of the plugin's follows one of them up
    to there at least: what comes after a token that SGLang chooses now and then is another text.
    """
    parting = [_same_beginning(a, b) for a, b in combinations(map(tuple, sglang), 2) if a != b]
    followed = [max(_same_beginning(ours, theirs) for theirs in sglang) for ours in plugin]
    return ITSELF if parting and min(parting) <= min(followed) else FAULT


def _same_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two answers have in common before they part."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in same)


def is_explained(row: Row) -> bool:
    """Whether SGLang's arm, asked alone again and again, explained other tokens."""
    return bool(row.get("difference", {}).get("verdict") == ITSELF)


def mismatched(row: Row) -> bool:
    """Whether tokens or the reason to finish differ, or the drafts where SGLang is repeatable.

    Not where SGLang alone explains other tokens: reason and drafts are those of another text then.
    """
    if is_explained(row):
        return False
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
