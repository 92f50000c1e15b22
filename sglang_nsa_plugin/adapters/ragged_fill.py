"""The fill before a replay whose requests extend by as many tokens as were accepted (spec v1).

SGLang 0.5.11 and 0.5.12 replay such a graph where the overlap scheduler is off. SGLang's own fill asks
the device twice how many tokens there are, and leaves the rows after the last token as they were.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from sglang_nsa_plugin.adapters import fields
from sglang_nsa_plugin.adapters.eager_fill import have_size, run, schedule_of, set_prefill_impl
from sglang_nsa_plugin.adapters.eager_names import SglangNames
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason, count_fallback
from sglang_nsa_plugin.adapters.outcome import Outcome
from sglang_nsa_plugin.dispatch import Choice
from sglang_nsa_plugin.log import logger_of
from sglang_nsa_plugin.state import STATE

logger = logger_of(__name__)

UNCHECKED = (
    "a shadow check was asked for, but this server's draft-extend replays are not checked: SGLang "
    "leaves some of their rows unfilled"
)


class RaggedFill:
    """The fills of one backend's captured metadata objects, one for each batch size.

    No ragged replay is shadow-checked; where ``check_every`` asks for that, the first replay logs it.
    ``accepted`` names SGLang's field with the rows per request.
    """

    def __init__(
        self,
        backend: Any,
        choice: Choice,
        names: SglangNames,
        accepted: str,
        check_every: int,
        outcome: Outcome,
    ) -> None:
        self.backend = backend
        self.names = names
        self.bind = choice.bind
        self._outcome = outcome
        self._accepted = accepted
        self._warns_of_no_check = bool(check_every)
        self._schedule = schedule_of(importlib.import_module(names.module))
        self._captured: dict[int, Captured] = {}

    def replay(self, bs: int, seq_lens: Any, req_pool_indices: Any, spec_info: Any) -> bool:
        """Fills the tensors of this batch size; False when SGLang has to do it instead."""
        if self._outcome.has_failed:
            return self._leave_to_sglang(FallbackReason.DIFFERENCE_FOUND)
        if not self._outcome.is_switched_on:
            return self._leave_to_sglang(FallbackReason.SWITCHED_OFF)
        if self._warns_of_no_check:
            logger.warning("sglang-nsa-plugin: %s", UNCHECKED)
            self._warns_of_no_check = False
        metadata = self.backend.decode_cuda_graph_metadata[bs]
        seq_lens, req_pool_indices = seq_lens[:bs], req_pool_indices[:bs]
        accepted = getattr(spec_info, self._accepted)[:bs]
        if not have_size(bs, seq_lens, req_pool_indices, accepted):
            return self._leave_to_sglang(FallbackReason.OTHER_SIZES)
        outputs = fields.read(metadata, self.names.outputs, (*fields.LENGTHS, *fields.TABLES))
        if outputs["page_table_1"].shape[0] != outputs["seqlens_expanded"].shape[0]:
            return self._leave_to_sglang(FallbackReason.OTHER_TABLE_ROWS)
        if self.backend.real_page_size == 1:
            outputs["real_page_table"] = None  # it is page_table_1
        set_prefill_impl(self.backend, self.names, None)
        run(
            self.bind,
            self._captured_object(bs, metadata),
            seq_lens=seq_lens,
            req_pool_indices=req_pool_indices,
            req_to_token=self.backend.req_to_token,
            extend_lens=accepted,
            index_topk=getattr(self.backend, self.names.index_topk),
            page_size=self.backend.real_page_size,
            **outputs,
        )
        self._refresh_derived(metadata)
        self.backend.forward_metadata = metadata
        STATE.launches += 1
        return True

    def _leave_to_sglang(self, reason: FallbackReason) -> bool:
        count_fallback(reason)
        return False

    def _captured_object(self, bs: int, metadata: Any) -> Captured:
        captured = self._captured.get(bs)
        if captured is None or captured.metadata is not metadata:
            captured = self._captured[bs] = Captured(metadata)
        return captured

    def _refresh_derived(self, metadata: Any) -> None:
        """Copies SGLang's derived tables, made over all captured rows, into the captured tensors.

        The kernels of the graph run on all rows; SGLang's own tables end with the accepted tokens.
        """
        names = ("mqa_schedule", "seqlens_expanded", "nsa_cache_seqlens")
        schedule, expanded, clamped = fields.read(metadata, self.names.outputs, names).values()
        if schedule is not None:
            assert self._schedule is not None  # SGLang made the table by the same call
            schedule.copy_(self._schedule(expanded))
        if metadata.flashmla_metadata is not None:
            metadata.flashmla_metadata.copy_(
                self.backend._compute_flashmla_metadata(cache_seqlens=clamped, seq_len_q=1)
            )


@dataclasses.dataclass
class Captured:
    """A captured metadata object, and whether FillArgs has validated its tensors."""

    metadata: Any
    validated: bool = False
