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
from sglang_nsa_plugin.log import logger_of

logger = logger_of(__name__)

KEY = "nsa_metadata"


def set_internal_state(original: Callable[[Any], Any], request: Any) -> Any:
    """SGLang's answer to the request, whose key ``nsa_metadata`` switches the fill.

    A request with a value that cannot be set goes to SGLang as it came. SGLang refuses the unknown key,
    and with it the whole request: it sets all of a request's values or none.
    """
    if KEY not in request.server_args:
        return original(request)
    value = request.server_args[KEY]
    why_not = _why_invalid(value) or OUTCOME.why_not_switchable(bool(value))
    if why_not is not None:
        logger.warning("sglang-nsa-plugin: %s=%s is refused: %s", KEY, value, why_not)
        return original(request)
    rest = copy.copy(request)
    rest.server_args = {name: each for name, each in request.server_args.items() if name != KEY}
    answer = original(rest)
    if answer.updated:
        install.switch(bool(value))
    return answer


def _why_invalid(value: Any) -> str | None:
    if value in (0, 1):
        return None
    return "must be 0 (SGLang fills) or 1 (the plugin fills)"
