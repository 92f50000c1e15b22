"""Who fills draft-extend metadata, as it was decided: noted in the state and said in the log, once."""

from __future__ import annotations

import logging
import textwrap
from importlib.metadata import version

from sglang_nsa_plugin import options
from sglang_nsa_plugin.dispatch import BackendUnavailableError, Choice
from sglang_nsa_plugin.state import STATE

logger = logging.getLogger(__name__)

# What setting up a fill may raise where it cannot run; torch's out-of-memory error is a RuntimeError.
START_ERRORS = (RuntimeError, ValueError, TypeError)


class CaptureError(RuntimeError):
    """The fill failed while SGLang captures a graph, which is broken by that."""

    def __init__(self, batch_size: int, error: Exception) -> None:
        super().__init__(
            f"the draft-extend fill of batch size {batch_size} failed inside SGLang's capture: "
            f"{type(error).__name__}: {error}. Start with {options.FLAG} off to serve with SGLang's "
            "own fill"
        )


def take_over(choice: Choice, makes_schedule: bool | None = None) -> None:
    """Notes and logs the implementation that fills a backend's metadata.

    ``makes_schedule`` says whether the same launch makes DeepGEMM's schedule, or DeepGEMM itself; None
    where no fill ever does. A server may have several such backends, of adaptive speculation for
    example: they say it once.
    """
    if STATE.backend is not None:
        return
    STATE.backend, STATE.reason = choice.name, choice.reason
    schedule = ""
    if makes_schedule is not None:
        STATE.mqa_schedule = choice.name if makes_schedule else "DeepGEMM"
        schedule = f"; MQA schedule by {STATE.mqa_schedule}"
    logger.info(
        "sglang-nsa-plugin %s: adapter %s, implementation %s: %s%s",
        version("sglang-nsa-plugin"),
        STATE.adapter,
        choice.name,
        choice.reason,
        schedule,
    )


def step_aside(reason: str) -> None:
    """Notes and logs that SGLang fills the metadata itself."""
    STATE.adapter, STATE.backend, STATE.reason = None, None, reason
    STATE.captures.clear()
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


def decline_after(asked_for: str, error: Exception) -> None:
    """Declines because the fill could not be set up.

    Raises:
        BackendUnavailableError: the backend was asked for by name.
    """
    if isinstance(error, BackendUnavailableError):  # says it all
        raise error
    why = textwrap.shorten(str(error), 300)
    decline(asked_for, f"the fill could not be set up: {type(error).__name__}: {why}")


def count_fallback(reason: str) -> None:
    """Counts a draft-extend step that SGLang fills although the adapter is there; logs the first."""
    if not STATE.fallbacks[reason]:
        logger.warning(
            "sglang-nsa-plugin: a draft-extend step goes through SGLang's own fill: %s; further ones "
            "are counted, not logged",
            reason,
        )
    STATE.fallbacks[reason] += 1
