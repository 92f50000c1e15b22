"""What ``sglang-nsa-plugin ab`` found on servers of several regimes, for docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from integration.figures.committed import SHOWN_RELEASE, gpu_name, paragraph, table
from integration.serving.gain_cells import WHOLE_STEP
from sglang_nsa_plugin.options import DEFAULT as AUTO
from sglang_nsa_plugin.options import KEEP

Part = dict[str, Any]  # of a result file: one cell, and what it is of
Cell = dict[str, Any]
HOST_BOUND = "2"  # layers
KINDS = {"bf16": "bfloat16", "fp8": "FP8"}
CONTEXTS = {"160k": "160 k", "1m": "1 M"}
# Of a server that leaves wide tables out SGLang's own fill does so, too, and is quicker than it was.
WIDE = {
    AUTO: "off: SGLang's fill without the wide page tables",
    KEEP: "off: exactly SGLang's own fill (`--nsa-metadata-wide-tables keep`)",
}
FEW = 3  # differences that are listed
NO_DIFFERENCE = "no difference beyond noise"
FIRST_MINUTE = "first-minute."
BESIDE = ", beside a process that holds a context"
MET = {True: "met", False: "not met", None: "not resolved"}
COLUMNS = (
    "server",
    "requests",
    "step, off",
    "saved",
    "step, on ÷ off",
    "control: step, off ÷ off",
    "tokens/s, on ÷ off",
    "verdict",
)
BOUND = "goal for the step"


def section(runs: Sequence[dict[str, Any]]) -> list[str]:
    """How a gain is measured, and what was found on each GPU.

    Args:
        runs: the files that ``make serve-test PART=gain`` wrote, one of each GPU.
    """
    blocks = [block for run in runs for block in _on_one_gpu(run["parts"])]
    return [_method(), *blocks] if blocks else []


def _method() -> str:
    return paragraph(
        "What that saving changes in the time of a step is measured inside one running server: "
        "`sglang-nsa-plugin ab URL` switches the plugin on, off and off again, in rotated order, and "
        "sends new requests each time ([docs/ab.md](ab.md)). *On ÷ off* is the figure with the plugin "
        "divided by the figure with SGLang's own fill: a step time below 1 means that the plugin is faster. "
        "*Off ÷ off*, the control, compares two measurements without the plugin: its distance from 1 is "
        "noise. *Saved* is by how much the plugin shortens the off step. Ratios are medians over the rounds; "
        "the range in brackets holds the true median in 95 of 100 runs. The server has the GPU to itself unless the table says otherwise. *Context* is what the server "
        "was started for, which sets the width of its tables; prompts have 512 tokens. 2 layers have the weights "
        "of a small checkpoint, 61 thin layers dummy weights, with which a step gives one token. *Goal* is the "
        "*on ÷ off* that was set as the most before the measurement; 1.00 allows for the control's noise."
    )


class Choice(NamedTuple):
    """What cells have in common that may stand in one table."""

    roles: tuple[str, ...]
    wide_tables: str = AUTO
    check: int = 0
    variables: tuple[tuple[str, str], ...] = ()


def _choice(part: Part) -> Choice:
    variables = tuple(part["variables"].items())
    return Choice(tuple(sorted(part["roles"])), part["wide_tables"], part["check"], variables)


def _what(part: Part) -> str:
    """'NVIDIA H200, driver 580.1, SGLang 0.5.23, verify filled, every fill shadow-checked'."""
    gpus = [gpu_name(gpu) for gpu in part["of"]["gpus"]]
    release = [] if part["sglang"] == SHOWN_RELEASE else [f"SGLang {part['sglang']}"]
    variables = [f"{name}={value}" for name, value in part["variables"].items()]
    check = part["check"]
    how_many = "every fill" if check == 1 else f"one fill in {check}"
    checked = [f"{how_many} shadow-checked"] if check else []
    wide = [WIDE[part["wide_tables"]]]
    return ", ".join([*gpus, *release, *variables, f"{_filled(part['roles'])} filled", *wide, *checked])


def cells(parts: dict[str, Any], choice: Choice) -> list[Part]:
    """The cells of servers of which exactly this is true, by server and requests."""
    found = [part for part in parts.values() if "cell" in part and _choice(part) == choice]
    return sorted(found, key=_place)


def claimed(parts: dict[str, Any], roles: Iterable[str]) -> list[Part]:
    """The cells alone on the GPU with these roles: against SGLang as it is, if there are such cells."""
    alone = {name: part for name, part in parts.items() if not part.get("beside")}
    kept, auto = (cells(alone, Choice(tuple(sorted(roles)), wide)) for wide in (KEEP, AUTO))
    return kept or auto


def _place(part: Part) -> tuple[Any, ...]:
    context, kind = part["regime"].split("-")[2:]
    places = list(CONTEXTS).index(context), list(KINDS).index(kind)
    return (int(_layers(part)), *places, part["beside"] is not None, int(part["cell"]["load"]))


def _on_one_gpu(parts: dict[str, Any]) -> Iterator[str]:
    """The cells of each choice of roles, the smallest one first; then the first minutes."""
    choices = {_choice(part) for part in parts.values() if "cell" in part}
    for choice in sorted(choices, key=lambda each: (len(each.roles), each)):
        found = cells(parts, choice)
        yield paragraph(f"{_what(found[0])}. {' '.join(in_words(found))}")
        has_bounds = any(part["cell"]["bound"] for part in found)
        columns = (*COLUMNS, BOUND) if has_bounds else COLUMNS
        yield table(columns, [_row(part)[: len(columns)] for part in found])
        yield "\n".join(_origins(found))
    for name, part in parts.items():
        if name.startswith(FIRST_MINUTE):
            yield from _first_minute(part)


def _filled(roles: Iterable[str]) -> str:
    names = ", ".join(sorted(roles))
    return f"the whole step ({names})" if set(roles) == WHOLE_STEP else names


def in_words(found: Sequence[Part]) -> Iterator[str]:
    """A sentence for the regimes that the host bounds, one for those that the GPU bounds, and one for the
    cells beside another process.
    """
    host, gpu = by_bound([part for part in found if not part["beside"]])
    beside = [part for part in found if part["beside"]]
    if host:
        yield f"Where the host bounds the step (2 layers): {_found(host)}."
    if gpu:
        layers = " or ".join(dict.fromkeys(_layers(part) for part in gpu))
        yield f"Where the GPU bounds it ({layers} thin layers of dummy weights): {_found(gpu)}."
    if beside:
        yield f"Beside another process that holds a context on the same GPU: {_found(beside)}."


def by_bound(found: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """The cells of the regimes that the host bounds, and of those that the GPU bounds."""
    host = [part for part in found if _layers(part) == HOST_BOUND]
    return host, [part for part in found if _layers(part) != HOST_BOUND]


def _found(parts: Sequence[Part]) -> str:
    """'a difference in 1 of 4 cells: …. No difference beyond noise in 2. 1 is not resolved'."""
    differing = [part for part in parts if differs(part["cell"])]
    unresolved = sum(not part["cell"]["resolved"] for part in parts)
    equal = len(parts) - len(differing) - unresolved
    if len(parts) == 1 and not unresolved:
        return f"a difference: {_differences(differing)}" if differing else NO_DIFFERENCE
    sentences = []
    if differing:
        sentences.append(
            f"a difference in {len(differing)} of {len(parts)} cells: {_differences(differing)}"
        )
    if equal:
        of = "" if differing else f" of {len(parts)} cells"
        sentences.append(f"{NO_DIFFERENCE} in {equal}{of}")
    if unresolved:
        sentences.append(f"{unresolved} {'is' if unresolved == 1 else 'are'} not resolved")
    return ". ".join(text[0].upper() + text[1:] if at else text for at, text in enumerate(sentences))


def _differences(parts: Sequence[Part]) -> str:
    """Each of them, or the range of many."""
    if len(parts) > FEW:
        medians = [part["cell"]["step_on_over_off"]["median"] for part in parts]
        return f"a step takes {min(medians):.3f} to {max(medians):.3f} of SGLang's"
    return "; ".join(
        f"{_server(part)}, {part['cell']['load']} at once, {_verdict(part['cell'])}" for part in parts
    )


def differs(cell: Cell) -> bool:
    """Whether the plugin makes a difference beyond noise, for the better or for the worse."""
    return bool(cell["resolved"]) and not cell["verdict"].startswith(NO_DIFFERENCE)


def _layers(part: Part) -> str:
    return str(part["regime"].partition("-")[0])


def _server(part: Part) -> str:
    """'61 layers, context 1 M, bfloat16'; beside another process the words for that come after it."""
    layers, _, context, kind = part["regime"].split("-")
    beside = BESIDE if part["beside"] else ""
    return f"{layers} layers, context {CONTEXTS[context]}, {KINDS[kind]}{beside}"


def _row(part: Part) -> tuple[str, ...]:
    """With the bound as its last column."""
    cell = part["cell"]
    head = (_server(part), cell["load"])
    bound = cell["bound"]
    limit = f"{bound['at_most']:.2f}: {MET[bound['met']]}" if bound else "-"
    if "rounds" not in cell:  # it was not measured
        return (*head, "-", "-", "-", "-", "-", _verdict(cell), limit)
    step, control, tokens = (
        _ratio(cell[ratio]) for ratio in ("step_on_over_off", "step_off_over_off", "tokens_on_over_off")
    )
    ms = cell["step_ms"]["off"]
    saved = f"{ms * (1 - cell['step_on_over_off']['median']):.2f} ms" if differs(cell) else "-"
    return (*head, f"{ms:.2f} ms", saved, step, control, tokens, _verdict(cell), limit)


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


def _origins(found: Sequence[Part]) -> Iterator[str]:
    """A line for neighbouring cells of one server and run."""
    for (server, origin), parts in groupby(found, lambda part: (_server(part), _origin(part))):
        loads = ", ".join(part["cell"]["load"] for part in parts)
        yield f"- {server}, {loads} at once: {origin}"


def _origin(part: Part) -> str:
    of, settings = part["of"], part["settings"]
    steps = f"{part['cell']['step_is']} steps, " if "step_is" in part["cell"] else ""
    note = f". {part['note'][0].upper()}{part['note'][1:]}." if "note" in part else "."
    return (
        f"commit {of['commit'][:7]}, {of['date'][:10]}, {steps}{settings['rounds']} rounds, "
        f"{settings['output_len']} new tokens{note}"
    )


def _first_minute(part: Part) -> Iterator[str]:
    of = part["of"]
    yield paragraph(
        "The first requests of a server (2 layers), one run each: they join one after the other, up to "
        f"{part['on']['at_once']} at once, and no metadata kernel of SGLang's is compiled yet. The table says "
        f"how long a client waited for the next tokens of one long answer, {_filled(part['roles'])} filled "
        f"({', '.join(map(gpu_name, of['gpus']))}, SGLang {part['sglang']}, commit {of['commit'][:7]}, "
        f"{of['date'][:10]})."
    )
    yield table(
        ("ms between tokens", "longest three", "median", "over 100 ms", "all, s"),
        [
            (
                title,
                ", ".join(f"{ms:,.0f}" for ms in part[arm]["longest_ms"][:3]),
                f"{part[arm]['median_ms']:.2f}",
                f"{part[arm]['over_100_ms']} of {part[arm]['pauses']:,}",
                f"{part[arm]['seconds']:.1f}",
            )
            for arm, title in (("off", "SGLang's own fill"), ("on", "with the plugin"))
        ],
    )
