"""The switch in service: ``/set_internal_state`` hands every fill to SGLang and takes it back.

SGLang's own endpoint reaches every rank, between two steps of its scheduler. Values are numbers::

    curl localhost:30000/set_internal_state --json '{"server_args": {"nsa_metadata": 0}}'
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin.adapters import install
from sglang_nsa_plugin.adapters.outcome import OUTCOME
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import logger_of, loses

logger = logger_of(__name__)

KEY = "nsa_metadata"
LOST = "a switch of the fill in service"


def set_internal_state(original: Callable[[Any], Any], request: Any) -> Any:
    """SGLang's answer to the request, whose key ``nsa_metadata`` switches the fill.

    A request with a value that cannot be set goes to SGLang as it came. SGLang refuses the unknown key,
    and with it the whole request: it sets all of a request's values or none.
    """
    rest = attempt(_without_key, loses(LOST), request)
    if rest is None:
        return original(request)
    answer = original(rest)
    attempt(_switch, loses(LOST), answer, request.server_args[KEY])
    return answer


def _without_key(request: Any) -> Any | None:
    """The request without the key; None where it has none, or a value that cannot be set."""
    if KEY not in request.server_args:
        return None
    value = request.server_args[KEY]
    why_not = _why_invalid(value) or OUTCOME.why_not_switchable(bool(value))
    if why_not is not None:
        logger.warning("sglang-nsa-plugin: %s=%s is refused: %s", KEY, value, why_not)
        return None
    rest = copy.copy(request)
    rest.server_args = {name: each for name, each in request.server_args.items() if name != KEY}
    return rest


def _switch(answer: Any, value: Any) -> None:
    if answer.updated:
        install.switch(bool(value))


def _why_invalid(value: Any) -> str | None:
    if value in (0, 1):
        return None
    return "must be 0 (SGLang fills) or 1 (the plugin fills)"
