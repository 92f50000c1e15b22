"""The fill of a draft-extend step that SGLang plans eagerly: one launch, then a new metadata object.

SGLang keeps a step's metadata until it has planned the next step, and enqueues both on one stream. So a
step may overwrite the tensors of the step before it, whose kernels run first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from sglang_nsa_plugin.adapters import fields
from sglang_nsa_plugin.adapters.eager_names import SglangNames
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason, count_fallback
from sglang_nsa_plugin.adapters.outcome import Outcome
from sglang_nsa_plugin.adapters.shadow_check import ShadowCheck, compare
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.dispatch import Choice
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.state import STATE

# Shapes whose length tensors are kept, a few kB each. Without DP padding a batch size has one shape.
KEPT_SHAPES = 512
# Tokens in a block of DeepGEMM's schedule, whatever the page size.
SCHEDULE_BLOCK = 64


class EagerFill:
    """The fills of one backend, step after step into the same tensors."""

    def __init__(
        self,
        backend: Any,
        choice: Choice,
        names: SglangNames,
        check_every: int,
        outcome: Outcome,
    ) -> None:
        self.backend = backend
        self.names = names
        self.bind = choice.bind
        self.outcome = outcome
        device = backend.req_to_token.device
        self.check = ShadowCheck(check_every, device, outcome) if check_every else None
        module = importlib.import_module(names.module)
        self._metadata = getattr(module, names.metadata)
        self._padded_tokens = importlib.import_module(f"{names.package}.utils").cal_padded_tokens
        # 0.5.11 leaves the schedule of these steps to the indexer.
        self._schedule = schedule_of(module) if plans_2d(module) else None
        self._page_table_1, self._real_page_table = PageTable(device), PageTable(device)
        self._lengths_of = functools.lru_cache(maxsize=KEPT_SHAPES)(self._allocate)

    def step(self, batch: Any, sglang_plan: Callable[[], object]) -> bool:
        """Fills and plans the step of this batch; False when SGLang has to plan it instead.

        ``sglang_plan`` is what SGLang would do. A shadow check calls it, too: it allocates new tensors.
        """
        reason = self._why_fallback(batch)
        if reason is not None:
            count_fallback(reason)
            return False
        backend = self.backend
        set_prefill_impl(backend, self.names, batch)
        rows = batch.extend_num_tokens
        longest = int(batch.seq_lens_cpu.max())
        lengths = self._lengths_of(batch.batch_size, rows, self._rows_of_forward(batch))
        page_table_1, real_page_table = self._page_tables(lengths, longest)
        run(
            self.bind,
            lengths,
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=batch.extend_seq_lens,
            index_topk=getattr(backend, self.names.index_topk),
            page_size=backend.real_page_size,
            page_table_1=page_table_1,
            real_page_table=None if real_page_table is page_table_1 else real_page_table,
            **lengths.outputs,
        )
        backend.forward_metadata = self._metadata(
            max_seq_len_k=longest,
            page_table_1=page_table_1[:rows],
            real_page_table=real_page_table[:rows],
            seq_lens_sum=batch.seq_lens_sum,
            indexer_seq_lens=batch.seq_lens,
            indexer_seq_lens_cpu=batch.seq_lens_cpu,
            **{self.names.nsa_extend_seq_lens_list: batch.extend_seq_lens_cpu},
            **self._derived(lengths),
            **lengths.fields,
        )
        STATE.launches += 1
        if self.check is not None and self.check.is_due():
            attempt(self._compare_with, self.check.stop, sglang_plan, self.check)
        return True

    def _compare_with(self, sglang_plan: Callable[[], object], check: ShadowCheck) -> None:
        backend, ours = self.backend, self.backend.forward_metadata
        try:
            sglang_plan()
            check.run(compare(ours, backend.forward_metadata, self.names.outputs, check))
        finally:
            backend.forward_metadata = ours

    def _why_fallback(self, batch: Any) -> FallbackReason | None:
        if self.check is not None and self.check.failed():  # told while off, too
            return FallbackReason.DIFFERENCE_FOUND
        if not self.outcome.is_switched_on:
            return FallbackReason.SWITCHED_OFF
        bs = batch.batch_size
        if not bs:
            return FallbackReason.NO_REQUESTS
        if batch.seq_lens_cpu is None:
            return FallbackReason.NO_HOST_LENGTHS
        if not have_size(bs, batch.seq_lens, batch.req_pool_indices, batch.extend_seq_lens):
            return FallbackReason.OTHER_SIZES
        if batch.extend_num_tokens != bs * self.backend.speculative_num_draft_tokens:
            return FallbackReason.OTHER_ROWS_PER_REQUEST
        return None

    def _rows_of_forward(self, batch: Any) -> int:
        """With DP attention the forward may have more rows than the batch; those get length 0."""
        if batch.global_num_tokens_cpu is None:
            return int(batch.extend_num_tokens)
        return max(int(batch.extend_num_tokens), int(self._padded_tokens(batch)))

    def _page_tables(self, lengths: Lengths, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``page_table_1`` and ``real_page_table``; one table where a page is a token."""
        width = min(longest, self.backend.req_to_token.shape[1])
        page = self.backend.real_page_size
        # Rounded up to vectors of four cells, which the kernel copies at once: no reader asks for the
        # width of this table. A padded row stride would not do: for FlashInfer's top-k, SGLang would
        # make a contiguous copy in each layer.
        page_table_1 = self._page_table_1.view(lengths.rows, -(-width // 4) * 4)
        if page == 1:
            return page_table_1, page_table_1
        return page_table_1, self._real_page_table.view(lengths.rows, -(-width // page))

    def _derived(self, lengths: Lengths) -> dict[str, Any]:
        """The tables that SGLang derives from the lengths."""
        derived = {}
        if self._schedule is not None:
            expanded = lengths.fields[self.names.outputs["seqlens_expanded"]]
            derived[self.names.outputs["mqa_schedule"]] = self._schedule(expanded)
        if getattr(self.backend, self.names.decode_impl) == "flashmla_kv":
            derived[fields.FLASHMLA] = self.backend._compute_flashmla_metadata(
                cache_seqlens=lengths.outputs["nsa_cache_seqlens"], seq_len_q=1
            )
        return derived

    def _allocate(self, bs: int, rows: int, rows_of_forward: int) -> Lengths:
        backend, names = self.backend, self.names
        sizes = (bs, bs + 1, rows_of_forward, rows_of_forward, rows_of_forward + 1)
        outputs = {
            name: torch.empty(size, dtype=torch.int32, device=backend.req_to_token.device)
            for name, size in zip(fields.LENGTHS, sizes, strict=True)
        }
        expanded = outputs["seqlens_expanded"][:rows]
        shared = {
            "page_size": backend.real_page_size,
            **{names.outputs[name]: tensor for name, tensor in outputs.items()},
            names.outputs["seqlens_expanded"]: expanded,
            "cu_seqlens_q": backend.get_device_int32_arange(rows + 1),
            "max_seq_len_q": 1,
            names.nsa_cu_seqlens_q: backend.get_device_int32_arange(rows_of_forward + 1),
            names.nsa_max_seqlen_q: 1,
        }
        ctx_lens = names.outputs["ctx_lens"]
        if self._schedule is not None and hasattr(self._metadata, ctx_lens):
            shared[ctx_lens] = expanded.view(-1, 1)
        return Lengths(rows_of_forward, outputs, shared)


@dataclasses.dataclass
class Lengths:
    """What a step of one shape fills beside the page tables.

    Attributes:
        rows: rows of the fill; those after the rows of the batch are padding.
        outputs: the tensors by their names in :class:`FillArgs`.
        fields: the fields of SGLang's metadata object that are the same in every step of this shape.
        validated: whether FillArgs has validated tensors of this shape.
    """

    rows: int
    outputs: dict[str, torch.Tensor]
    fields: dict[str, Any]
    validated: bool = False


class PageTable:
    """Memory for the page table of the current step.

    Widths differ from step to step, so tables are cut out of one allocation. It grows with the largest
    batch, an eighth ahead, to about what SGLang allocates for that batch: one table by request, and one
    by row. Memory for the largest possible batch would be gigabytes, which a server has given to its KV
    cache. Cells that no step has written hold slot 0, SGLang's padding.
    """

    def __init__(self, device: torch.device) -> None:
        self._cells = torch.zeros(0, dtype=torch.int32, device=device)

    def view(self, rows: int, width: int) -> torch.Tensor:
        """A contiguous table [rows, width] with what earlier steps left in its cells."""
        size = rows * width
        if size > self._cells.shape[0]:
            self._cells = self._cells.new_zeros(size + size // 8)
        return self._cells.as_strided((rows, width), (width, 1))


def run(bind: Callable[[FillArgs], Callable[[], None]], shape: Any, **tensors: Any) -> None:
    """Fills once. FillArgs validates the tensors once for each shape, whose ``validated`` says so.

    SGLang hands over new input tensors in each step, and validating takes ten times as long as binding
    and launching.
    """
    args = FillArgs.unvalidated(**tensors) if shape.validated else FillArgs(**tensors)
    shape.validated = True
    bind(args)()


def have_size(size: int, *tensors: torch.Tensor) -> bool:
    """The precondition of :func:`run` for a shape that was validated."""
    return all(tensor.shape[0] == size for tensor in tensors)


def set_prefill_impl(backend: Any, names: SglangNames, batch: Any) -> None:
    """Lets SGLang choose where the batch can change something: the call takes longer than a launch."""
    if backend.use_mha or backend.enable_auto_select_prefill_impl:
        getattr(backend, names.set_prefill_impl)(batch)


def plans_2d(module: ModuleType) -> bool:
    """Whether this SGLang hands DeepGEMM context lengths as [rows, 1], which 0.5.12 and later do."""
    return hasattr(module, "_to_2d_context_lens")


def schedule_of(module: ModuleType) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """SGLang's call of DeepGEMM for lengths [rows]; None where SGLang makes no schedule."""
    from sglang.srt.utils import is_cuda

    if not is_cuda() or importlib.util.find_spec("deep_gemm") is None:
        return None
    deep_gemm = importlib.import_module("deep_gemm")
    shape = (-1, 1) if plans_2d(module) else (-1,)
    return lambda lengths: deep_gemm.get_paged_mqa_logits_metadata(
        lengths.view(shape), SCHEDULE_BLOCK, deep_gemm.get_num_sms()
    )
