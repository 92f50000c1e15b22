"""The names of the installed SGLang beside those that the plugin uses, where it has others.

    python -m integration.releases.names

prints a JSON list, an object for each target: what the plugin uses of it, what is there, and the misfit,
or null where more is there than is used. Imports SGLang; needs no GPU.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
from collections.abc import Iterable
from typing import Any, TypedDict

from sglang_nsa_plugin.adapters import fields, hooks, tree_mask
from sglang_nsa_plugin.adapters.adapter import Adapter
from sglang_nsa_plugin.adapters.hooks import Fields, Hook, Requirement, Sets
from sglang_nsa_plugin.adapters.install import adapter_for_installed

# A dataclass of SGLang's all of whose fields the plugin knows; of others it reads a few.
KNOWN_METADATA = "DSAMetadata"


class Name(TypedDict):
    """One target of SGLang's."""

    target: str
    ours: list[str]
    theirs: list[str]
    misfit: str | None


def table(adapter: Adapter) -> Iterable[Requirement]:
    """Everything that the adapter and its roles use, and the function that makes verify's mask."""
    for parts in (adapter.common, *adapter.parts.values()):
        yield from parts.requirements
    if adapter.name == "in-graph":
        yield tree_mask.HOOK


def changed(rows: Iterable[Requirement]) -> list[Name]:
    """Rows that do not fit, and those whose target has more than the plugin uses."""
    found: list[Name] = []
    for row in rows:
        misfit = next(iter(hooks.misfits([row])), None)
        ours, theirs = list(_used(row)), _there(row)
        hands_all_through = isinstance(row, Hook) and row.and_more
        if misfit is not None or (set(theirs) - set(ours) and not hands_all_through):
            found.append(Name(target=row.target, ours=ours, theirs=theirs, misfit=misfit))
    return found


def _used(row: Requirement) -> tuple[str, ...]:
    if isinstance(row, (Fields, Sets)):
        known = fields.LEFT_AS_CAPTURED if row.target.endswith(KNOWN_METADATA) else ()
        return (*row.names, *known)
    return row.parameters


def _there(row: Requirement) -> list[str]:
    try:
        target: Any = pkgutil.resolve_name(row.target)
    except (ImportError, AttributeError):
        return []
    if isinstance(row, Sets):
        return []
    if isinstance(row, Fields):
        if not row.target.endswith(KNOWN_METADATA) or not dataclasses.is_dataclass(target):
            return []
        return [field.name for field in dataclasses.fields(target)]
    return list(inspect.signature(target).parameters) if inspect.isroutine(target) else []


if __name__ == "__main__":
    print(json.dumps(changed(table(adapter_for_installed()))))
