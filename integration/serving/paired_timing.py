"""Timings of two servers in turn, and the ratio of each pair."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

from integration.serving.compare import prompts
from integration.serving.server import Server

TOKENS = 192
AT_ONCE = 16  # the greatest captured batch size


def step_milliseconds(target: Server, turn: int) -> float:
    (prompt,) = prompts([300], seed=100 + turn)
    answer = target.generate(prompt, 2 * TOKENS)
    return 1000 * answer.seconds / answer.steps


def throughput(target: Server, turn: int) -> float:
    batch = prompts([200] * AT_ONCE, seed=200 + turn)
    answers, seconds = target.generate_at_once(batch, TOKENS)
    return sum(len(answer.output_ids) for answer in answers) / seconds


def paired(
    subject: Server,
    reference: Server,
    measure: Callable[[Server, int], float],
    count: int,
    rounds: int = 1,
) -> dict[str, Any]:
    """Measures both in turn ``count`` times, after one pair to warm up.

    A pair's values are the medians of ``rounds`` turns. Each server has half of the cores meanwhile.
    The order changes with each turn and the halves change hands with every second one: four turns hold
    each order on each half.
    """
    cores = sorted(os.sched_getaffinity(0))
    values: dict[str, list[float]] = {subject.name: [], reference.name: []}
    for pair in range(-1, count):
        turns = range(pair * rounds, (pair + 1) * rounds)
        found = [_turn(subject, reference, measure, turn, cores) for turn in turns]
        if pair >= 0:
            for name, each in values.items():
                each.append(statistics.median(turn[name] for turn in found))
    for target in (subject, reference):
        target.pin(cores)
    ratios = [a / b for a, b in zip(values[subject.name], values[reference.name], strict=True)]
    return {
        "pairs": count,
        "rounds": rounds,
        **{name: spread(each) for name, each in values.items()},
        f"{subject.name}_over_{reference.name}": {**spread(ratios), "each": rounded(ratios)},
    }


def _turn(
    subject: Server,
    reference: Server,
    measure: Callable[[Server, int], float],
    number: int,
    cores: list[int],
) -> dict[str, float]:
    middle = len(cores) // 2
    halves = cores[:middle], cores[middle:]
    # whichever half is the faster one, and on shared hosts one is for minutes, nobody keeps it
    subject.pin(halves[number // 2 % 2])
    reference.pin(halves[1 - number // 2 % 2])
    order = (subject, reference) if number % 2 else (reference, subject)
    return {target.name: measure(target, number) for target in order}


def spread(values: list[float]) -> dict[str, float]:
    median, least, most = statistics.median(values), min(values), max(values)
    return dict(zip(("median", "min", "max"), rounded([median, least, most]), strict=True))


def rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
