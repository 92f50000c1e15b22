"""The plans that the in-graph adapter fills, and in what they differ: three of a speculative step, and
plain decode, which is all of a step without speculation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sglang_nsa_plugin.state import (
    DECODE,
    DECODE_STATE,
    DRAFT_DECODE,
    DRAFT_DECODE_STATE,
    DRAFT_EXTEND,
    STATE,
    VERIFY,
    VERIFY_STATE,
    State,
)


class Inputs(Enum):
    """How the tensors that a runner passes before a replay relate to those that the graph reads.

    SAME_OBJECTS: they are the captured tensors.

    NEW_SLICES: each replay passes new tensor objects over the same memory.

    COPIED: they may be the batch's own, whose values the runner has copied into the captured ones.
    """

    SAME_OBJECTS = "same objects"
    NEW_SLICES = "new slices"
    COPIED = "copied"


@dataclass(frozen=True)
class Role:
    """A plan: which rows it has, and how the plugin gets at it.

    Attributes:
        name: as users see it.
        is_mode: asks a ForwardMode of SGLang's whether it is this plan's.
        has_row_per_draft: whether a request has a row for each draft token; else it has one.
        adds_drafts: whether the plan's lengths count draft tokens that ``seq_lens`` does not count yet.
        ends_step: whether no plan of a speculative step comes after it. Then the plugin has a hook
            behind its replay: it publishes the event that frees ``req_to_token``, and checks. A plan
            before it needs no event of its own: its fill comes before the last one's on one stream.
            Nor does plain decode: SGLang records its own in the graph, see :mod:`supported`.
        is_of_target: whether it is the target model's plan; that graph has nearly all kernels of a step.
        inputs: what a replay passes.
        state: what is reported of it.
    """

    name: str
    is_mode: Callable[[Any], bool]
    has_row_per_draft: bool
    adds_drafts: bool
    ends_step: bool
    is_of_target: bool
    inputs: Inputs
    state: State

    def modes(self) -> list[Any]:
        """Every ForwardMode of SGLang's that says it is this plan's; the adapter takes one alone."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        return [mode for mode in ForwardMode if self.is_mode(mode)]

    def rows_per_request(self, draft_tokens: int | None) -> int:
        """How many rows a request has in this plan. Without speculation there are no draft tokens."""
        return draft_tokens if draft_tokens and self.has_row_per_draft else 1

    def length_offset(self, draft_tokens: int | None) -> int:
        """How many tokens of a request ``seq_lens`` does not count yet."""
        return draft_tokens if draft_tokens and self.adds_drafts else 0


DRAFT_EXTEND_ROLE = Role(
    DRAFT_EXTEND,
    lambda mode: bool(mode.is_draft_extend_v2()),
    has_row_per_draft=True,
    adds_drafts=False,
    ends_step=True,
    is_of_target=False,
    inputs=Inputs.SAME_OBJECTS,
    state=STATE,
)
DRAFT_DECODE_ROLE = Role(
    DRAFT_DECODE,
    lambda mode: bool(mode.is_decode()),
    has_row_per_draft=False,
    adds_drafts=False,
    ends_step=False,
    is_of_target=False,
    inputs=Inputs.COPIED,
    state=DRAFT_DECODE_STATE,
)
VERIFY_ROLE = Role(
    VERIFY,
    lambda mode: bool(mode.is_target_verify()),
    has_row_per_draft=True,
    adds_drafts=True,
    ends_step=False,
    is_of_target=True,
    inputs=Inputs.NEW_SLICES,
    state=VERIFY_STATE,
)
# SGLang's ForwardMode of draft-decode, on the target's backend and without drafts.
DECODE_ROLE = Role(
    DECODE,
    lambda mode: bool(mode.is_decode()),
    has_row_per_draft=False,
    adds_drafts=False,
    ends_step=False,
    is_of_target=True,
    inputs=Inputs.NEW_SLICES,
    state=DECODE_STATE,
)
