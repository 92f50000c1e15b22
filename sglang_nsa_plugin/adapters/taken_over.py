"""What the in-graph adapter has taken over in this process: backends, their fills, and who fills.

The *owner* of a fill is the object of SGLang that a runner calls: a DSA backend, or the multi-step
backend of draft-decode, which holds several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import wide_tables
from sglang_nsa_plugin.adapters.adapter import SET_UP_ERRORS, Request, Takeover
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, CaptureError, is_capturing
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.roles import DRAFT_DECODE_ROLE, DRAFT_EXTEND_ROLE, VERIFY_ROLE, Role

NAME = "in-graph"
ATTRIBUTE = "_nsa_fills"  # on an owner: its BackendFills
FAST_PATH = "_nsa_fast_path"  # on an owner: the `fast_path` of its BackendFills
RETIRED = "_nsa_retired_fill"  # on an owner that was handed back: its former BackendFills
ROLES = (DRAFT_DECODE_ROLE, VERIFY_ROLE, DRAFT_EXTEND_ROLE)  # as SGLang captures them


def consider(
    owner: Any,
    backend: Any,
    model_runner: Any,
    role: Role,
    why_unsupported: Callable[[Any, Any], str | None],
) -> None:
    """Takes an owner over, whose fill writes ``backend``'s metadata, where it is asked for and fits."""
    takeover = TAKEOVERS[role.name]
    request = takeover.request
    if request is None:
        return
    why_not = why_unsupported(owner, model_runner)
    if why_not is None:
        _take_over(owner, backend, request, role, takeover)
    else:
        takeover.outcome.step_aside(request.asked_for, why_not)


def _take_over(owner: Any, backend: Any, request: Request, role: Role, takeover: Takeover) -> None:
    try:
        choice = dispatch.choose(request.backend, backend.req_to_token.device)
        fills = BackendFills(
            backend,
            role,
            choice,
            request.check_every,
            takeover.outcome,
            drops_wide_tables=wide_tables.can_be_dropped() and not request.keeps_wide_tables,
        )
    except SET_UP_ERRORS as error:
        takeover.fail(error)
        return
    setattr(owner, ATTRIBUTE, fills)
    setattr(owner, FAST_PATH, fills.fast_path)
    takeover.add(owner)
    takeover.outcome.report_active(NAME, choice, fills.remainder_last is not None)


def hand_back(owner: Any) -> None:
    """SGLang fills for this owner from now on, whatever graphs of it were captured."""
    for takeover in TAKEOVERS.values():
        takeover.discard(owner)
    vars(owner).pop(FAST_PATH, None)
    fills = vars(owner).pop(ATTRIBUTE, None)
    if fills is not None:
        fills.retire()
        setattr(owner, RETIRED, fills)  # graphs hold its addresses


def _revalidate(owner: Any) -> None:
    getattr(owner, ATTRIBUTE).fast_path.clear()


# An error while one role is set up, or in its service, hands back the owners of that role alone.
TAKEOVERS = {role.name: Takeover(hand_back, _revalidate, OUTCOMES[role.name]) for role in ROLES}


def why_unfilled(owner: Any) -> str | None:
    """Why no step of an owner that was taken over is filled, or None."""
    fills = getattr(owner, ATTRIBUTE)
    if fills.captured:
        return None
    return f"SGLang captured no CUDA graph of {fills.role.name}, and this adapter fills nothing else"


def record(original: Callable[..., Any], owner: Any, forward_batch: Any) -> Any:
    """Around ``init_forward_metadata_in_graph``, which a runner calls at capture: records the fill."""
    fills = getattr(owner, ATTRIBUTE, None)
    if fills is None or forward_batch.forward_mode is not fills.mode:
        return original(owner, forward_batch)
    capturing = is_capturing()
    try:
        fills.record(forward_batch)
    except SET_UP_ERRORS as error:
        if capturing:
            raise CaptureError(fills.role.name, forward_batch.batch_size, error) from error
        TAKEOVERS[fills.role.name].fail(error)
        return original(owner, forward_batch)
    return None
