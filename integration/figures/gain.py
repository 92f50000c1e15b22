"""What ``sglang-nsa-plugin ab`` found on servers of several regimes, for docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from integration.figures.committed import gpu_name, paragraph, table

Cell = dict[str, Any]
NamedCell = tuple[str, Cell]  # with the name of its regime
HOST_BOUND = "2"  # layers
KINDS = {"bf16": "bfloat16", "fp8": "FP8"}
CONTEXTS = {"160k": "160 k", "1m": "1 M"}
NO_DIFFERENCE = "no difference beyond noise"
FIRST_MINUTE = "first-minute"
COLUMNS = (
    "server",
    "requests",
    "step, off",
    "step, on ÷ off",
    "control: step, off ÷ off",
    "tokens/s, on ÷ off",
    "verdict",
)


def section(runs: Sequence[dict[str, Any]]) -> list[str]:
    """How a gain is measured, and what was found on each GPU.

    Args:
        runs: the files that ``make serve-test PART=gain`` wrote, one of each GPU.
    """
    blocks = [block for run in runs for block in _on_one_gpu(run["parts"])]
    return [_method(), *blocks] if blocks else []


def _method() -> str:
    return paragraph(
        "What that saving changes in the time of a step is measured inside one running server that has the GPU to "
        "itself: `sglang-nsa-plugin ab URL` switches the plugin on, off and off again, in rotated order, and "
        "sends new requests each time ([docs/ab.md](ab.md)). *On ÷ off* is the figure with the plugin "
        "divided by the figure with SGLang's own fill: a step time below 1 means that the plugin is faster. "
        "*Off ÷ off*, the control, compares two measurements without the plugin: its distance from 1 is "
        "noise. Ratios are medians over the rounds; the range in brackets holds the true median in 95 of 100 runs."
    )


def _on_one_gpu(parts: dict[str, Any]) -> Iterator[str]:
    compared = {name: part for name, part in parts.items() if "cells" in part}
    if compared:
        gpus = dict.fromkeys(gpu_name(gpu) for part in compared.values() for gpu in part["of"]["gpus"])
        yield paragraph(f"{', '.join(gpus)}. {' '.join(in_words(compared))}")
        rows = [_row(name, cell) for name, part in compared.items() for cell in part["cells"]]
        yield table(COLUMNS, rows)
        yield "\n".join(_origin(name, part) for name, part in compared.items())
    if FIRST_MINUTE in parts:
        yield from _first_minute(parts[FIRST_MINUTE])


def in_words(compared: dict[str, Any]) -> Iterator[str]:
    """One sentence for the regimes that the host bounds, one for those that the GPU bounds."""
    host, gpu = by_bound(compared)
    if host:
        yield f"Where the host bounds the step (2 layers): {_found(host)}."
    if gpu:
        layers = " or ".join(dict.fromkeys(_layers(name) for name, _ in gpu))
        yield f"Where the GPU bounds it ({layers} thin layers of dummy weights): {_found(gpu)}."


def by_bound(parts: dict[str, Any]) -> tuple[list[NamedCell], list[NamedCell]]:
    """The cells of the regimes that the host bounds, and of those that the GPU bounds."""
    cells = [(name, cell) for name, part in parts.items() for cell in part.get("cells", ())]
    host = [each for each in cells if _layers(each[0]) == HOST_BOUND]
    return host, [each for each in cells if each not in host]


def _found(cells: Sequence[NamedCell]) -> str:
    """'no difference beyond noise in 2 of 4 cells, 1 not resolved; a difference in 1: …'."""
    differing = [(name, cell) for name, cell in cells if differs(cell)]
    unresolved = sum(not cell["resolved"] for _, cell in cells)
    equal = len(cells) - len(differing) - unresolved
    text = f"{NO_DIFFERENCE} in {equal} of {len(cells)} cells"
    if unresolved:
        text += f", {unresolved} not resolved"
    if differing:
        each = (f"{_regime(name)}, {cell['load']} at once, {_verdict(cell)}" for name, cell in differing)
        text += f"; a difference in {len(differing)}: {'; '.join(each)}"
    return text


def differs(cell: Cell) -> bool:
    """Whether the plugin makes a difference beyond noise, for the better or for the worse."""
    return bool(cell["resolved"]) and not cell["verdict"].startswith(NO_DIFFERENCE)


def _layers(name: str) -> str:
    return name.partition("-")[0]


def _regime(name: str) -> str:
    """'61-layers-1m-bf16' → '61 layers, context 1 M, bfloat16'."""
    layers, _, context, kind = name.split("-")
    return f"{layers} layers, context {CONTEXTS[context]}, {KINDS[kind]}"


def _row(name: str, cell: Cell) -> tuple[str, ...]:
    head = (_regime(name), cell["load"])
    if "rounds" not in cell:  # it was not measured
        return (*head, "-", "-", "-", "-", _verdict(cell))
    step, control, tokens = (
        _ratio(cell[ratio]) for ratio in ("step_on_over_off", "step_off_over_off", "tokens_on_over_off")
    )
    return (*head, f"{cell['step_ms']['off']:.2f} ms", step, control, tokens, _verdict(cell))


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:  # the server did not say how many tokens
        return "-"
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _verdict(cell: Cell) -> str:
    """The verdict of ``ab``, without the advice and without the figures that stand beside it."""
    what, *more = re.split(r": |\. ", cell["verdict"])
    if not cell["resolved"]:
        return f"{what}: {more[0]}"
    return str(what).removeprefix("with the plugin a step is ")


def _origin(name: str, part: dict[str, Any]) -> str:
    of = part["of"]
    note = f". {part['note'][0].upper()}{part['note'][1:]}." if "note" in part else "."
    settings = part["settings"]
    return (
        f"- {_regime(name)}: commit {of['commit'][:7]}, {of['date'][:10]}, {settings['rounds']} rounds, "
        f"{settings['output_len']} new tokens{note}"
    )


def _first_minute(part: dict[str, Any]) -> Iterator[str]:
    of = part["of"]
    yield paragraph(
        "The first minute of a server (2 layers) whose traffic brings a new batch size every second, with no "
        "metadata kernel of SGLang's compiled yet: how long a client waited for the next tokens of one long "
        f"answer ({', '.join(map(gpu_name, of['gpus']))}, commit {of['commit'][:7]}, {of['date'][:10]})."
    )
    yield table(
        ("ms between tokens", "longest three", "median", "over 100 ms"),
        [
            (
                title,
                ", ".join(f"{ms:,.0f}" for ms in part[arm]["longest_ms"][:3]),
                f"{part[arm]['median_ms']:.2f}",
                f"{part[arm]['over_100_ms']} of {part[arm]['pauses']:,}",
            )
            for arm, title in (("off", "SGLang's own fill"), ("on", "with the plugin"))
        ],
    )
