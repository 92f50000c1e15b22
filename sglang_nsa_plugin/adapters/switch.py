"""The switch in service: ``/set_internal_state`` hands fills to SGLang and takes them back.

SGLang's own endpoint reaches every rank, between two steps of its scheduler. Values are numbers::

    curl localhost:30000/set_internal_state -H 'Content-Type: application/json' \\
        -d '{"server_args": {"nsa_metadata": 0}}'

``nsa_metadata`` switches every role that is filled; ``nsa_metadata_verify``, ``nsa_metadata_decode``
and so on switch one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from sglang_nsa_plugin.adapters import install
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import logger_of, loses
from sglang_nsa_plugin.state import ALL_ROLES

logger = logger_of(__name__)

KEY = "nsa_metadata"
# The roles that a key switches.
KEYS = {KEY: ALL_ROLES, **{f"{KEY}_{role.replace('-', '_')}": (role,) for role in ALL_ROLES}}
LOST = "a switch of the fill in service"


def set_internal_state(original: Callable[[Any], Any], request: Any) -> Any:
    """SGLang's answer to the request, some of whose keys may switch fills.

    A request with a value that cannot be set goes to SGLang as it came. SGLang refuses the unknown key,
    and with it the whole request: it sets all of a request's values or none.
    """
    rest = attempt(_without_keys, loses(LOST), request)
    if rest is None:
        return original(request)
    answer = original(rest)
    attempt(_switch, loses(LOST), answer, request.server_args)
    return answer


def _without_keys(request: Any) -> Any | None:
    """The request without our keys; None where it has none, or a value that cannot be set."""
    asked = {key: value for key, value in request.server_args.items() if key in KEYS}
    if not asked:
        return None
    for key, value in asked.items():
        why_not = _why_invalid(value) or _why_not_switchable(KEYS[key], bool(value))
        if why_not is not None:
            logger.warning("sglang-nsa-plugin: %s=%s is refused: %s", key, value, why_not)
            return None
    rest = copy.copy(request)
    rest.server_args = {key: each for key, each in request.server_args.items() if key not in asked}
    return rest


def _switch(answer: Any, server_args: dict[str, Any]) -> None:
    if not answer.updated:
        return
    for key, roles in KEYS.items():
        if key in server_args:
            for role in _switchable(roles, bool(server_args[key])):
                install.switch(role, bool(server_args[key]))


def _switchable(roles: Iterable[str], on: bool) -> list[str]:
    return [role for role in roles if OUTCOMES[role].why_not_switchable(on) is None]


def _why_not_switchable(roles: tuple[str, ...], on: bool) -> str | None:
    """Why none of these roles can be switched, or None: the first one's reason."""
    return None if _switchable(roles, on) else OUTCOMES[roles[0]].why_not_switchable(on)


def _why_invalid(value: Any) -> str | None:
    if value in (0, 1):
        return None
    return "must be 0 (SGLang fills) or 1 (the plugin fills)"
