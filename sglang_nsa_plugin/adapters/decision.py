"""Leaving the fill to SGLang: in one log line, or by ending the start of whoever insisted."""

from __future__ import annotations

import logging
from importlib.metadata import version

from sglang_nsa_plugin import options
from sglang_nsa_plugin.dispatch import BackendUnavailableError
from sglang_nsa_plugin.state import STATE

logger = logging.getLogger(__name__)


def step_aside(reason: str) -> None:
    """Notes and logs that SGLang fills the metadata itself."""
    STATE.adapter, STATE.reason = None, reason
    logger.info(
        "sglang-nsa-plugin %s: not used: %s; SGLang fills draft-extend metadata itself",
        version("sglang-nsa-plugin"),
        reason,
    )


def decline(asked_for: str, reason: str) -> None:
    """Steps aside where the backend was left to the plugin.

    Raises:
        BackendUnavailableError: the backend was asked for by name.
    """
    if asked_for != options.DEFAULT:
        raise BackendUnavailableError(
            f"{options.FLAG} {asked_for} was asked for by name and cannot be used: {reason}. "
            f"Use 'auto' or 'off' to serve with SGLang's own fill"
        )
    step_aside(reason)
