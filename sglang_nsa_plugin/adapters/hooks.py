"""A table row for each place of SGLang that the plugin hooks or calls, and how it is looked up.

A table fits a release when every row does: the target exists and has the parameters, fields or
attributes that the plugin uses. What a release has besides does not matter, as long as it may be left
out. Versions are never compared. Hooks go through SGLang's HookRegistry and nothing else.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable
from typing import Any

DISTRIBUTION = "sglang-nsa-plugin"


@dataclasses.dataclass(frozen=True)
class Hook:
    """One AROUND hook: ``replacement(original, *args, **kwargs)`` takes the place of ``target``.

    Attributes:
        target: the dotted path of a function or method.
        parameters: those of the target, in its order. It may have others that can be left out.
        replacement: what is called instead. It hands the parameters that it names to the target by
            position, and whatever else SGLang passes as it was passed.
        also: the parameters that the target has in other releases, where the replacement serves those.
        and_more: whether the target may have further parameters that must be passed.
    """

    target: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]
    also: tuple[tuple[str, ...], ...] = ()
    and_more: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """A function or method of SGLang that an adapter calls with these parameters and no others.

    Attributes:
        target: its dotted path.
        parameters: those that are passed, in its order.
        also: their names in other releases, where they are passed by position.
    """

    target: str
    parameters: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of a dataclass of SGLang that an adapter reads."""

    target: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sets:
    """Attributes that a method of SGLang sets on its object, and an adapter reads there.

    Of a class: that any of the methods sets that it does not inherit.
    """

    target: str
    names: tuple[str, ...]


Requirement = Hook | Call | Fields | Sets


def misfits(requirements: Iterable[Requirement]) -> list[str]:
    """What the installed SGLang lacks, one sentence for each row; empty when everything fits."""
    return [problem for row in requirements if (problem := _why_unfit(row)) is not None]


def _why_unfit(row: Requirement) -> str | None:
    try:
        target = pkgutil.resolve_name(row.target)
    except (ImportError, AttributeError) as error:
        return f"{row.target} is missing ({error})"
    if isinstance(row, Fields):
        if not dataclasses.is_dataclass(target):
            return f"{row.target} is not a dataclass"
        present = {field.name for field in dataclasses.fields(target)}
        missing = [name for name in row.names if name not in present]
        return f"{row.target} has no field {', '.join(missing)}" if missing else None
    if isinstance(row, Sets):
        missing = [name for name in row.names if name not in _attributes_set(target, row.target)]
        return f"{row.target} sets no attribute {', '.join(missing)}" if missing else None
    if not inspect.isroutine(target):
        return f"{row.target} is not a function"
    parameters = inspect.signature(target).parameters
    accepted = (row.parameters, *row.also)
    and_more = isinstance(row, Hook) and row.and_more
    if not any(_accepts(parameters.values(), names, and_more) for names in accepted):
        expected = " or ".join(f"({', '.join(names)})" for names in accepted)
        return f"{row.target} takes ({', '.join(parameters)}), expected {expected}"
    if isinstance(row, Hook) and (by_name := _by_name(target) & _handed_by_position(row.replacement)):
        return f"{row.target} takes {', '.join(sorted(by_name))} by name alone, expected by position"
    return None


def _accepts(parameters: Collection[inspect.Parameter], names: tuple[str, ...], and_more: bool) -> bool:
    """Whether a target takes these parameters in this order; with ``and_more``, not these alone."""
    by_name = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    in_order = [each.name for each in parameters if each.name not in by_name]
    expected = [name for name in names if name not in by_name]
    is_enough = not any(_is_required(each) for each in parameters if each.name not in names)
    return in_order[: len(expected)] == expected and (is_enough or and_more)


def _by_name(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _handed_by_position(replacement: Callable[..., Any]) -> set[str]:
    """The parameters that a replacement names: it hands them to the target by position."""
    parameters = inspect.signature(replacement).parameters.values()
    return {each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _is_required(parameter: inspect.Parameter) -> bool:
    takes_any = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not takes_any


def _attributes_set(target: Any, name: str) -> set[str]:
    """What a method sets, or any method that a class itself has.

    Where another plugin put a subclass in place, the class that it derives from counts as well.
    """
    if not inspect.isclass(target):
        return _stored_by(target)
    found: set[str] = set()
    for each in inspect.getmro(target):
        methods = filter(inspect.isfunction, vars(each).values())
        found.update(attribute for method in methods for attribute in _stored_by(method))
        if f"{each.__module__}.{each.__qualname__}" == name:
            break
    return found


def _stored_by(method: Any) -> set[str]:
    code = getattr(inspect.unwrap(method), "__code__", None)
    instructions = dis.get_instructions(code) if code is not None else ()
    return {each.argval for each in instructions if each.opname == "STORE_ATTR"}


_before: dict[str, object] = {}  # target: the function that was there when we registered our hook
_after: dict[str, object] = {}  # target: the function that was there when our hook had taken


def register(hooks: Iterable[Hook]) -> None:
    """Hands the hooks to SGLang's HookRegistry, each target once; SGLang applies them later."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name="nsa", dist_name=DISTRIBUTION)
    for hook in hooks:
        if hook.target not in _before:
            _before[hook.target] = _function(hook.target)
            HookRegistry.register(hook.target, hook.replacement, HookType.AROUND, source=source)


def apply_now(hook: Hook) -> str | None:
    """Registers a hook and has SGLang apply it. Returns why it is not in force, or None."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if unfit := misfits([hook]):
        return f"this SGLang does not fit: {unfit[0]}"
    register([hook])
    HookRegistry.apply_hooks()
    return why_not_applied([hook])


def why_skipped(hooks: Iterable[Hook]) -> str | None:
    """Which of the registered hooks SGLang is going to skip, or None. Known before it applies them.

    The registry applies hooks once per target: a target that another plugin patched before is skipped.
    It has no public way to ask; should its attribute go, :func:`why_not_applied` still finds out.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    patched = getattr(HookRegistry, "_patched", ())
    return _patched_before([target for target in _registered(hooks) if target in patched])


def why_not_applied(hooks: Iterable[Hook]) -> str | None:
    """Which of the registered hooks did not take, or None. To be asked after SGLang applied them."""
    skipped = []
    for target in _registered(hooks):
        if _is_applied(target):
            _after.setdefault(target, _function(target))
        else:
            skipped.append(target)
    return _patched_before(skipped)


def why_replaced(hooks: Iterable[Hook]) -> str | None:
    """Which hooks took and are out of force now, or None: something replaced the function since then.

    A wrapper that sets ``__wrapped__``, as ``functools.wraps`` does, keeps the hook in force.
    """
    replaced = [target for target in _registered(hooks) if target in _after and not _in_force(target)]
    return f"another plugin replaced {', '.join(replaced)} after this one" if replaced else None


def applied(hooks: Iterable[Hook]) -> list[str]:
    """The targets of these hooks at which the plugin's hook is in force."""
    return sorted(target for target in _registered(hooks) if _is_applied(target))


def _registered(hooks: Iterable[Hook]) -> list[str]:
    return [hook.target for hook in hooks if hook.target in _before]


def _patched_before(targets: list[str]) -> str | None:
    if not targets:
        return None
    names = sorted({name for target in targets for name in _other_plugins(target)})
    which = f" ({', '.join(names)})" if names else ""
    return f"another plugin{which} patched {', '.join(targets)} before"


def _other_plugins(target: str) -> list[str]:
    """The plugins that SGLang's registry knows to have hooked a target, as far as it says so."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    entries = getattr(HookRegistry, "_hooks", {}).get(target, ())
    sources = [source for *_, source in entries if source is not None]
    return [source.plugin_name for source in sources if source.dist_name != DISTRIBUTION]


def _is_applied(target: str) -> bool:
    return _function(target) is not _before[target]


def _in_force(target: str) -> bool:
    function = _function(target)
    while function is not None and function is not _after[target]:
        function = getattr(function, "__wrapped__", None)
    return function is not None


def _function(target: str) -> object:
    """The function at the target; of a class method the one it wraps: each look-up binds it anew."""
    found = pkgutil.resolve_name(target)
    return getattr(found, "__func__", found)
