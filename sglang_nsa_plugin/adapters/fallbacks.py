"""Why a step of a backend that the plugin took over goes to SGLang's own fill."""

from __future__ import annotations

from enum import Enum

from sglang_nsa_plugin.log import logger_of
from sglang_nsa_plugin.state import STATE, State

logger = logger_of(__name__)


class FallbackReason(Enum):
    """The values are public: the label ``reason`` of the metric ``fallbacks_total``."""

    INPUTS_REPLACED = "input tensors are not the captured ones"
    DIFFERENCE_FOUND = "the shadow check found a difference"
    SWITCHED_OFF = "switched off in service"
    NO_REQUESTS = "the batch has no requests"
    NO_HOST_LENGTHS = "the batch has no sequence lengths on the host"
    OTHER_SIZES = "the batch's tensors have other sizes than its number of requests"
    OTHER_ROWS_PER_REQUEST = "requests do not extend by the number of draft tokens each"
    UNKNOWN_ARGUMENTS = "SGLang passed arguments that the plugin does not know"
    OTHER_TABLE_ROWS = "the captured page table and lengths have different numbers of rows"


def count_fallback(reason: FallbackReason, state: State = STATE) -> None:
    """Counts a step that SGLang fills although the adapter is active; logs the first of each reason.

    The switch has logged itself.
    """
    if not state.fallbacks[reason.value] and reason is not FallbackReason.SWITCHED_OFF:
        logger.warning(
            "sglang-nsa-plugin: SGLang filled this %s step: %s. Further ones are counted, not logged",
            state.role,
            reason.value,
        )
    state.fallbacks[reason.value] += 1
