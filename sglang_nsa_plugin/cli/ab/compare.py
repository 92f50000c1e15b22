"""Ratios of a cell's rounds, how sure they are, and the verdict in words.

A round measures three arms: on, off and off again, in rotated order. It gives a ratio on ÷ off, where
off is the mean of both, and a ratio off ÷ off, the control. Drift from one round to the next cancels. A
ratio is reported as its median over the rounds, with a range that holds the true median in 95 of 100
runs: the sorted ratios without as many at either end as the sign test leaves out. That assumes nothing
about the distribution of the noise.

The step of a cell is the median step, so that a few long ones do not decide. Where SGLang sent fewer
events than steps in one of its arms, it is the mean in all of them: a median and a mean do not compare.

A cell is resolved if its control lies within 2 % of 1. There is a difference if the range of on ÷ off
leaves out 1 and its median is further from 1 than both ends of the control's range. In a simulation of
3,000 cells with noise alone, 12 rounds each, 5 were said to have one.
"""

from __future__ import annotations

import statistics
from math import comb
from typing import Any, NamedTuple

from sglang_nsa_plugin.cli.ab.load import Measured

ON, OFF, OFF_AGAIN = ARMS = ("on", "off", "off again")
FEWEST_ROUNDS = 6  # of fewer, not even the whole range is that sure
CONTROL_TOLERANCE = 0.02

Round = dict[str, Measured]


class Ratio(NamedTuple):
    """Median of paired ratios, and the range of that median."""

    median: float
    low: float
    high: float


def compared(rounds: list[Round]) -> dict[str, Any]:
    """Medians of each arm, ratios and the verdict of one cell."""
    has_median = all(turn[arm].median_step_ms is not None for turn in rounds for arm in ARMS)
    step_name = "median_step_ms" if has_median else "step_ms"
    steps = [{arm: getattr(turn[arm], step_name) for arm in ARMS} for turn in rounds]
    step, control = ratios(steps)
    result = {
        "rounds": len(rounds),
        "step_is": "median" if has_median else "mean",
        "step_ms": _medians(rounds, step_name),
        "tokens_per_s": _medians(rounds, "tokens_per_s"),
        "tokens_per_step": _medians(rounds, "tokens_per_step"),
        "step_on_over_off": step._asdict(),
        "step_off_over_off": control._asdict(),
        "tokens_on_over_off": None,
    }
    rates = [{arm: turn[arm].tokens_per_s for arm in ARMS} for turn in rounds]
    known = [{arm: rate for arm, rate in turn.items() if rate} for turn in rates]
    if all(len(turn) == len(ARMS) for turn in known):
        result["tokens_on_over_off"] = ratios(known)[0]._asdict()
    is_resolved, verdict = verdict_of(step, control)
    return {**result, "resolved": is_resolved, "verdict": verdict}


def ratios(rounds: list[dict[str, float]]) -> tuple[Ratio, Ratio]:
    """on ÷ off and off ÷ off over these rounds."""
    pairs = [2 * turn[ON] / (turn[OFF] + turn[OFF_AGAIN]) for turn in rounds]
    return ratio(pairs), ratio([turn[OFF_AGAIN] / turn[OFF] for turn in rounds])


def ratio(values: list[float]) -> Ratio:
    """The median of these values and its range."""
    ordered = sorted(values)
    left_out = _left_out(len(ordered))
    return Ratio(statistics.median(ordered), ordered[left_out], ordered[-1 - left_out])


def verdict_of(step: Ratio, control: Ratio) -> tuple[bool, str]:
    """Whether the cell is resolved, and what it says."""
    if abs(control.median - 1) > CONTROL_TOLERANCE:
        return False, (
            f"not resolved: off ÷ off is {control.median:.3f}, more than {CONTROL_TOLERANCE:.0%} "
            "from 1. Something else changes the step time: take other load away or raise --rounds"
        )
    noise = max(abs(control.low - 1), abs(control.high - 1))
    if step.low <= 1 <= step.high or abs(step.median - 1) <= noise:
        return True, (
            "no difference beyond noise: on ÷ off "
            f"{step.low:.3f} to {step.high:.3f}, off ÷ off {control.low:.3f} to {control.high:.3f}"
        )
    word = "faster" if step.median < 1 else "slower"
    least, most = sorted(abs(1 - each) for each in (step.low, step.high))
    by = abs(1 - step.median)
    return True, f"with the plugin a step is {by:.1%} {word} ({least:.1%} to {most:.1%})"


def _left_out(count: int) -> int:
    """How many values at either end the range of the median leaves out, at 95 % confidence."""
    tail, left_out = 1, 0  # in whole numbers, of 2**count: many rounds are more than a float holds
    while 2 * (tail + comb(count, left_out + 1)) / 2**count <= 0.05:
        left_out += 1
        tail += comb(count, left_out)
    return left_out


def _medians(rounds: list[Round], name: str) -> dict[str, float | None]:
    """By arm; both off arms together."""
    of_arms = {"on": (ON,), "off": (OFF, OFF_AGAIN)}
    medians: dict[str, float | None] = {}
    for word, arms in of_arms.items():
        values = [getattr(turn[arm], name) for turn in rounds for arm in arms]
        medians[word] = None if None in values else statistics.median(values)
    return medians
