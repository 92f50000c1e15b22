"""The fill before a replay whose requests extend by as many tokens as were accepted (spec v1).

SGLang 0.5.11 and 0.5.12 replay such a graph where the overlap scheduler is off. Their own fill asks the
device twice how many tokens there are, and leaves the rows behind them as they were.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any

from sglang_nsa_plugin.adapters.eager_fill import (
    OTHER_SIZES,
    have_size,
    run,
    schedule_of,
    set_prefill_impl,
)
from sglang_nsa_plugin.adapters.eager_names import Names
from sglang_nsa_plugin.adapters.outcome import count_fallback
from sglang_nsa_plugin.adapters.shadow_check import DIFFERENT, found_difference
from sglang_nsa_plugin.dispatch import Choice
from sglang_nsa_plugin.state import STATE

logger = logging.getLogger(__name__)

UNCHECKED = (
    "a shadow check was asked for, but the draft-extend replays of this server are not checked: SGLang "
    "leaves rows of theirs unfilled"
)
OTHER_ROWS = "the captured page table and lengths have different numbers of rows"


class RaggedFill:
    """The fills of one backend's captured metadata objects, one for each batch size.

    No ragged replay is shadow-checked; where ``check_every`` asks for that, the first one says so.
    """

    def __init__(
        self, backend: Any, choice: Choice, names: Names, accepted: str, check_every: int
    ) -> None:
        self.backend = backend
        self.names = names
        self.bind = choice.bind
        self._accepted = accepted
        self._says_unchecked = bool(check_every)
        self._schedule = schedule_of(importlib.import_module(names.module))
        self._captured: dict[int, Captured] = {}

    def replay(self, bs: int, seq_lens: Any, req_pool_indices: Any, spec_info: Any) -> bool:
        """Fills the tensors of this batch size; False when SGLang has to do it instead."""
        if found_difference():
            count_fallback(DIFFERENT)
            return False
        if self._says_unchecked:
            logger.warning("sglang-nsa-plugin: %s", UNCHECKED)
            self._says_unchecked = False
        backend, names = self.backend, self.names
        metadata = backend.decode_cuda_graph_metadata[bs]
        captured = self._captured.get(bs)
        if captured is None or captured.metadata is not metadata:
            captured = self._captured[bs] = Captured(metadata)
        seq_lens, req_pool_indices = seq_lens[:bs], req_pool_indices[:bs]
        accepted = getattr(spec_info, self._accepted)[:bs]
        if not have_size(bs, seq_lens, req_pool_indices, accepted):
            count_fallback(OTHER_SIZES)
            return False
        if metadata.page_table_1.shape[0] != getattr(metadata, names.seqlens_expanded).shape[0]:
            count_fallback(OTHER_ROWS)
            return False
        set_prefill_impl(backend, names, None)
        run(
            self.bind,
            captured,
            seq_lens=seq_lens,
            req_pool_indices=req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=accepted,
            index_topk=getattr(backend, names.index_topk),
            page_size=backend.real_page_size,
            cache_seqlens=metadata.cache_seqlens_int32,
            cu_seqlens_k=metadata.cu_seqlens_k,
            seqlens_expanded=getattr(metadata, names.seqlens_expanded),
            nsa_cache_seqlens=getattr(metadata, names.cache_seqlens),
            nsa_cu_seqlens_k=getattr(metadata, names.cu_seqlens_k),
            page_table_1=metadata.page_table_1,
            real_page_table=metadata.real_page_table if backend.real_page_size > 1 else None,
        )
        self._refresh_derived(metadata)
        backend.forward_metadata = metadata
        STATE.launches += 1
        return True

    def _refresh_derived(self, metadata: Any) -> None:
        """SGLang's tables over all captured rows, into the tensors that were captured.

        The kernels of the graph run on all of them; SGLang's own tables end with the accepted tokens.
        """
        if metadata.paged_mqa_schedule_metadata is not None:
            assert self._schedule is not None  # SGLang made the table by the same call
            lengths = getattr(metadata, self.names.seqlens_expanded)
            metadata.paged_mqa_schedule_metadata.copy_(self._schedule(lengths))
        if metadata.flashmla_metadata is not None:
            metadata.flashmla_metadata.copy_(
                self.backend._compute_flashmla_metadata(
                    cache_seqlens=getattr(metadata, self.names.cache_seqlens), seq_len_q=1
                )
            )


@dataclasses.dataclass
class Captured:
    """A captured metadata object, and whether FillArgs has seen its tensors."""

    metadata: Any
    checked: bool = False
