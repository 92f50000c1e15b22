"""Verify on SM100: DeepGEMM's context lengths and schedule go by requests, not by rows.

There SGLang gives DeepGEMM the draft tokens of a request together, and one length for each request, in
as many columns as it has draft tokens. No such GPU has been seen. So the plugin fills these tensors only
where verify is asked for by name, and where its schedule equals DeepGEMM's own at the start.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_nsa_plugin import dispatch, options
from sglang_nsa_plugin.adapters import mqa_schedule
from sglang_nsa_plugin.adapters.roles import Role
from sglang_nsa_plugin.state import ROLES


def columns_of(backend: Any, role: Role) -> int:
    """The columns of the context lengths that SGLang makes in this plan: one, or more by request."""
    if not role.adds_drafts:
        return 1
    (mode,) = role.modes()
    rows = role.rows_per_request(backend.speculative_num_draft_tokens)
    lengths = torch.ones(rows, dtype=torch.int32, device=backend.req_to_token.device)
    laid_out = backend._build_paged_mqa_schedule_2d_ctx_lens(
        forward_mode=mode, cache_seqlens_int32=lengths[:1], seqlens_expanded=lengths, batch_size=1
    )
    return int(laid_out.shape[1])


def why_not_named(backend: Any, role: Role, is_named: bool) -> str | None:
    """Why a plan by request stays with SGLang unless its role was asked for by name, or None."""
    columns = 1 if is_named else columns_of(backend, role)
    if columns == 1:
        return None
    return (
        f"on this GPU {role.name} needs context lengths of [requests, {columns}], and no such GPU has "
        f"been tried. To fill them all the same, start with {options.ROLES_FLAG} {','.join(ROLES)}"
    )


def remainder_last(backend: Any, columns: int, choice: dispatch.Choice) -> bool | None:
    """:func:`mqa_schedule.remainder_last`; by request, there has to be one.

    Raises:
        ValueError: by request, and the implementation is wrong or makes another schedule than DeepGEMM.
    """
    if columns == 1:
        return mqa_schedule.remainder_last(backend, choice.bind)
    what = f"context lengths of [requests, {columns}]"
    why_wrong = dispatch.why_wrong_by_request(choice.name, backend.req_to_token.device)
    if why_wrong is not None:
        raise ValueError(f"{what}: {choice.name}: {why_wrong}")
    last = mqa_schedule.remainder_last(backend, choice.bind, columns)
    if last is None:
        raise ValueError(f"{what}: {choice.name} makes another schedule of them than DeepGEMM does here")
    return last


def warning(columns: int, role: Role) -> str | None:
    """What an operator has to know of a role that is filled by request, or None."""
    if columns == 1:
        return None
    return (
        f"{role.name}: context lengths of [requests, {columns}] are untried on a GPU. Their schedule "
        "equalled DeepGEMM's at this start, and without a GPU all values equalled SGLang's. "
        f"Please start with {options.CHECK_FLAG} 1, and report what you see"
    )
