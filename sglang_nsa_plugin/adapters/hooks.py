"""A table row for each place of SGLang that an adapter hooks or calls, and how it is checked.

An adapter fits a release when every row does: the target exists and has the parameters, fields or
attributes that the adapter uses. Versions are never compared.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hook:
    """One AROUND hook: ``replacement(original, *args, **kwargs)`` takes the place of ``target``.

    The target must have these parameters and no others: SGLang may hand over any of them. ``also`` are
    the parameters that the target has in other releases, where the replacement serves those too.
    """

    target: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]
    also: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """A function or method of SGLang that an adapter calls with these parameters."""

    target: str
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of a dataclass of SGLang that an adapter reads."""

    target: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sets:
    """Attributes that a method of SGLang sets on its object, and an adapter reads there."""

    target: str
    names: tuple[str, ...]


Row = Hook | Call | Fields | Sets


def misfits(rows: Iterable[Row]) -> list[str]:
    """What the installed SGLang lacks, one sentence a row; empty when everything fits."""
    return [problem for row in rows if (problem := _misfit(row)) is not None]


def _misfit(row: Row) -> str | None:
    try:
        target = pkgutil.resolve_name(row.target)
    except (ImportError, AttributeError) as error:
        return f"{row.target} is missing ({error})"
    if isinstance(row, Fields):
        if not dataclasses.is_dataclass(target):
            return f"{row.target} is no dataclass"
        present = {field.name for field in dataclasses.fields(target)}
        missing = [name for name in row.names if name not in present]
        return f"{row.target} has no field {', '.join(missing)}" if missing else None
    if not inspect.isroutine(target):
        return f"{row.target} is no function"
    if isinstance(row, Sets):
        missing = [name for name in row.names if name not in _attributes_set(target)]
        return f"{row.target} sets no attribute {', '.join(missing)}" if missing else None
    names = tuple(inspect.signature(target).parameters)
    if isinstance(row, Hook):
        accepted, compared = (row.parameters, *row.also), names
    else:
        accepted, compared = (row.parameters,), names[: len(row.parameters)]
    if compared not in accepted:
        expected = " or ".join(f"({', '.join(parameters)})" for parameters in accepted)
        return f"{row.target} takes ({', '.join(names)}), expected {expected}"
    return None


def _attributes_set(method: Callable[..., Any]) -> set[str]:
    code = getattr(inspect.unwrap(method), "__code__", None)
    instructions = dis.get_instructions(code) if code is not None else ()
    return {each.argval for each in instructions if each.opname == "STORE_ATTR"}


_installed: dict[str, object] = {}  # target: what stands there since our hook was applied


def install(hooks: Iterable[Hook]) -> list[str]:
    """Applies the hooks through SGLang's HookRegistry; returns the targets that did not take theirs.

    The registry applies hooks once a target: one that another plugin patched earlier is skipped.
    Installing twice changes nothing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name="nsa", dist_name="sglang-nsa-plugin")
    new = [hook for hook in hooks if hook.target not in _installed]
    before = {hook.target: pkgutil.resolve_name(hook.target) for hook in new}
    for hook in new:
        HookRegistry.register(hook.target, hook.replacement, HookType.AROUND, source=source)
    HookRegistry.apply_hooks()
    after = {target: pkgutil.resolve_name(target) for target in before}
    _installed.update({t: now for t, now in after.items() if now is not before[t]})
    return [target for target, now in after.items() if now is before[target]]


def installed() -> list[str]:
    """The targets at which a hook of ours stands."""
    return sorted(_installed)
