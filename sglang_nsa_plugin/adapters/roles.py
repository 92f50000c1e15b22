"""The plans of a speculative step that the in-graph adapter fills, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_nsa_plugin.state import DRAFT_EXTEND, STATE, VERIFY, VERIFY_STATE, State


@dataclass(frozen=True)
class Role:
    """A plan: every request has as many rows as draft tokens, in both of them.

    Attributes:
        name: as users see it.
        is_mode: asks a ForwardMode of SGLang's whether it is this plan's.
        counts_drafts: whether ``seq_lens`` counts the draft tokens already. Where it does not, the fill
            adds them to every length.
        ends_step: whether no plan of a speculative step comes after it. Then the plugin has a hook
            behind its replay: it publishes the event that frees ``req_to_token``, and checks. A plan
            before it needs no event of its own: its fill comes before the last one's on one stream.
        is_handed_slices: whether each replay passes new tensor objects over the same memory.
        state: what is reported of it.
    """

    name: str
    is_mode: Callable[[Any], bool]
    counts_drafts: bool
    ends_step: bool
    is_handed_slices: bool
    state: State

    def modes(self) -> list[Any]:
        """Every ForwardMode of SGLang's that says it is this plan's; the adapter takes one alone."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        return [mode for mode in ForwardMode if self.is_mode(mode)]

    def length_offset(self, draft_tokens: int) -> int:
        """How many tokens of a request ``seq_lens`` does not count yet."""
        return 0 if self.counts_drafts else draft_tokens


DRAFT_EXTEND_ROLE = Role(
    DRAFT_EXTEND,
    lambda mode: bool(mode.is_draft_extend_v2()),
    counts_drafts=True,
    ends_step=True,
    is_handed_slices=False,
    state=STATE,
)
VERIFY_ROLE = Role(
    VERIFY,
    lambda mode: bool(mode.is_target_verify()),
    counts_drafts=False,
    ends_step=False,
    is_handed_slices=True,
    state=VERIFY_STATE,
)
