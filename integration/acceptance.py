"""Steps by the number of drafts that they accepted: SGLang's ``spec_accept_histogram``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Elementwise sum; the shorter one ends in zeros."""
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


def mean_tokens(accepted_drafts: Sequence[int]) -> float:
    """Tokens of a step: accepted drafts and one of the target's own; 0 without steps."""
    steps = sum(accepted_drafts)
    tokens = sum((drafts + 1) * count for drafts, count in enumerate(accepted_drafts))
    return round(tokens / steps, 4) if steps else 0.0
