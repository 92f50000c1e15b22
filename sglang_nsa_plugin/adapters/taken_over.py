"""What the in-graph adapter has taken over in this process: backends, their fills, and who fills.

The *owner* of a fill is the object of SGLang that a runner calls: a DSA backend, or the multi-step
backend of draft-decode, which holds several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import by_request, fields, kpool, wide_tables
from sglang_nsa_plugin.adapters.adapter import SET_UP_ERRORS, Request, Takeover
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, CaptureError, is_capturing
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.adapters.roles import (
    DECODE_ROLE,
    DRAFT_DECODE_ROLE,
    DRAFT_EXTEND_ROLE,
    VERIFY_ROLE,
    Role,
)
from sglang_nsa_plugin.adapters.supported import ONE_STEP
from sglang_nsa_plugin.containment import attempt

NAME = "in-graph"
ATTRIBUTE = "_nsa_fills"  # on an owner: its BackendFills
FAST_PATH = "_nsa_fast_path"  # on an owner: the `fast_path` of its BackendFills
RETIRED = "_nsa_retired_fill"  # on an owner that was handed back: its former BackendFills
# As SGLang captures them with speculation, and without.
ROLES = (DRAFT_DECODE_ROLE, VERIFY_ROLE, DRAFT_EXTEND_ROLE, DECODE_ROLE)
CAPTURED_AGAIN = (
    "SGLang captured the graphs of this role again in service. After that a server may end at the next "
    "request: once with SGLang alone, each time with the fill in the new graphs (S66 in "
    "docs/failure-modes.md). Restart the server to have the plugin fill this role"
)


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
        why_not = by_request.why_not_named(backend, role, request.is_named)
    if why_not is None:
        _take_over(owner, backend, request, role, takeover)
    elif why_not != ONE_STEP:  # such a backend has nothing to fill, whoever fills the others
        takeover.outcome.step_aside(request.asked_for, why_not)
        takeover.release()  # one outcome for all backends of the role


def _take_over(owner: Any, backend: Any, request: Request, role: Role, takeover: Takeover) -> None:
    # Without speculation SGLang itself leaves a wide table out that nothing reads.
    may_drop = role is not DECODE_ROLE and wide_tables.can_be_dropped()
    try:
        device = backend.req_to_token.device
        choice = dispatch.choose(request.backend, device, with_kpool=kpool.is_pooled(backend))
        fills = BackendFills(
            backend,
            role,
            choice,
            request.check_every,
            takeover.outcome,
            drops_wide_tables=may_drop and not request.keeps_wide_tables,
        )
    except SET_UP_ERRORS as error:
        takeover.fail(error)
        return
    setattr(owner, ATTRIBUTE, fills)
    setattr(owner, FAST_PATH, fills.fast_path)
    takeover.add(owner)
    warning = by_request.warning(fills.columns, role)
    takeover.outcome.report_active(NAME, choice, fills.remainder_last is not None, warning)


def hand_back(owner: Any) -> None:
    """SGLang fills for this owner from now on, whatever graphs of it were captured."""
    fills = vars(owner).get(ATTRIBUTE)
    if fills is not None:
        fills.retire()  # first: while it cannot be switched off, the owner is ours
        setattr(owner, RETIRED, fills)  # graphs hold its addresses
    for takeover in TAKEOVERS.values():
        takeover.discard(owner)
    vars(owner).pop(FAST_PATH, None)
    vars(owner).pop(ATTRIBUTE, None)


def does_without_wide_tables(backend: Any) -> bool:
    """Whether the next graphs of this backend leave the wide table out.

    A backend that was handed back goes on as its last graphs did: the memory of their table may have
    been given to the KV cache.
    """
    fills = getattr(backend, ATTRIBUTE, None)
    if fills is not None:
        return bool(fills.drops_wide_tables)
    return RETIRED in vars(backend) and wide_tables.is_dropped(backend)


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


def leave_unknown_call(owner: Any, in_capture: bool) -> None:
    """Before a call whose arguments the plugin does not know: a newer SGLang may mean another plan."""
    fills = getattr(owner, ATTRIBUTE, None)
    if fills is None:
        return
    fills.drop_last_check()
    if not in_capture:
        abandon = TAKEOVERS[fills.role.name].abandon
        attempt(fills.leave_to_sglang, abandon, FallbackReason.UNKNOWN_ARGUMENTS)


def drop_last_checks() -> None:
    """Leaves out each comparison that is still to come: what it would read may change before it runs."""
    for takeover in TAKEOVERS.values():
        for owner in takeover.backends:
            getattr(owner, ATTRIBUTE).drop_last_check()


def forget_graphs(fills: BackendFills) -> None:
    """Before SGLang allocates for new graphs: what was captured for the old ones goes.

    In service SGLang fills from then on. The wide page tables stay dropped, because their memory
    may have been given to the KV cache.
    """
    is_captured_again = bool(fills.captured) and fills.outcome.is_in_service
    fills.forget()
    if is_captured_again:
        attempt(_leave_captured_again, TAKEOVERS[fills.role.name].abandon, fills)


def _leave_captured_again(fills: BackendFills) -> bool:
    TAKEOVERS[fills.role.name].release()
    fills.outcome.report_idle(CAPTURED_AGAIN)
    return False


def record(
    original: Callable[..., Any], owner: Any, forward_batch: Any, *more: Any, **named: Any
) -> Any:
    """Around ``init_forward_metadata_in_graph``, which a runner calls at capture: records the fill.

    What SGLang itself records there is recorded, too, unless it is a fill.
    """
    fills = getattr(owner, ATTRIBUTE, None)
    sglangs = functools.partial(original, owner, forward_batch, *more, **named)
    if fills is None or forward_batch.forward_mode is not fills.mode:
        return sglangs()
    capturing = is_capturing()
    try:
        if not capturing:
            _validate_sglangs(sglangs, fills, forward_batch)
        fills.record(forward_batch)
    except SET_UP_ERRORS as error:
        if capturing:
            raise CaptureError(fills.role.name, forward_batch.batch_size, error) from error
        TAKEOVERS[fills.role.name].fail(error)
    return sglangs()


def _validate_sglangs(sglangs: Callable[[], Any], fills: BackendFills, batch: Any) -> None:
    """SGLang's own part of a graph must be no fill: ours would be one too many, or the fallback none.

    Asked in the first warm-up of a backend, by lengths that are longer by one token.
    """
    if fills.captured:
        return
    metadata = fills.metadata_of(batch)
    names = ("cache_seqlens", "nsa_cache_seqlens")
    lengths = [each for each in fields.read(metadata, fields.DSA, names).values() if each is not None]
    before = [each.clone() for each in lengths]
    longer = [each.add_(1).clone() for each in lengths]
    sglangs()
    wrote = not all(map(torch.equal, lengths, longer))
    for each, kept in zip(lengths, before, strict=True):
        each.copy_(kept)
    if wrote:
        raise ValueError(f"{type(fills.backend).__name__} fills {fills.role.name} in the graph itself")
