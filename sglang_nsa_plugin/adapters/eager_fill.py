"""The fill of a draft-extend step that SGLang plans eagerly: one launch, then a new metadata object.

SGLang keeps a step's metadata until it has planned the next one, and enqueues both on one stream: a
step may write over the tensors of the step before, whose kernels run first.
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

from sglang_nsa_plugin.adapters.eager_names import CTX_LENS, Names
from sglang_nsa_plugin.adapters.outcome import count_fallback
from sglang_nsa_plugin.adapters.shadow_check import DIFFERENT, ShadowCheck, compare
from sglang_nsa_plugin.dispatch import Choice
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.state import STATE

NO_REQUESTS = "the batch has no requests"
NO_HOST_LENGTHS = "the batch has no sequence lengths on the host"
OTHER_SIZES = "the batch's tensors have other sizes than its number of requests"
OTHER_WIDTH = "requests do not extend by the number of draft tokens each"

# Shapes whose tensors of lengths are kept, a few kB each. Without DP padding there is one a batch size.
KEPT_SHAPES = 512
# DeepGEMM splits the cache of a request into parts of four blocks, always of 64 tokens.
SCHEDULE_BLOCK = 64


class EagerFill:
    """The fills of one backend, step after step into the same tensors."""

    def __init__(self, backend: Any, choice: Choice, names: Names, check_every: int) -> None:
        self.backend = backend
        self.names = names
        self.bind = choice.bind
        device = backend.req_to_token.device
        self.check = ShadowCheck(check_every, device) if check_every else None
        module = importlib.import_module(names.module)
        self._metadata = getattr(module, names.metadata)
        self._padded_tokens = importlib.import_module(f"{names.package}.utils").cal_padded_tokens
        # 0.5.11 leaves the schedule of these steps to the indexer.
        self._schedule = schedule_of(module) if plans_2d(module) else None
        self._wide, self._paged = PageTable(device), PageTable(device)
        self._lengths_of = functools.lru_cache(maxsize=KEPT_SHAPES)(self._allocate)

    def step(self, batch: Any, sglang_plan: Callable[[], object]) -> bool:
        """Fills and plans the step of this batch; False when SGLang has to plan it instead.

        ``sglang_plan`` is what SGLang would do: a shadow check does it too, into tensors of its own.
        """
        why_not = self._unfit(batch)
        if why_not is not None:
            count_fallback(why_not)
            return False
        backend = self.backend
        set_prefill_impl(backend, self.names, batch)
        rows = batch.extend_num_tokens
        longest = int(batch.seq_lens_cpu.max())
        lengths = self._lengths_of(batch.batch_size, rows, self._rows_of_forward(batch))
        wide, paged = self._page_tables(lengths, longest)
        run(
            self.bind,
            lengths,
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=batch.extend_seq_lens,
            index_topk=getattr(backend, self.names.index_topk),
            page_size=backend.real_page_size,
            page_table_1=wide,
            real_page_table=None if paged is wide else paged,
            **lengths.outputs,
        )
        backend.forward_metadata = self._metadata(
            max_seq_len_k=longest,
            page_table_1=wide[:rows],
            real_page_table=paged[:rows],
            seq_lens_sum=batch.seq_lens_sum,
            indexer_seq_lens=batch.seq_lens,
            indexer_seq_lens_cpu=batch.seq_lens_cpu,
            **{self.names.extend_seq_lens_list: batch.extend_seq_lens_cpu},
            **self._derived(lengths),
            **lengths.fields,
        )
        STATE.launches += 1
        if self.check is not None and self.check.is_due():
            self._compare_with(sglang_plan, self.check)
        return True

    def _compare_with(self, sglang_plan: Callable[[], object], check: ShadowCheck) -> None:
        backend, ours = self.backend, self.backend.forward_metadata
        sglang_plan()
        check.run(compare(ours, backend.forward_metadata, self.names.prefix, check))
        backend.forward_metadata = ours

    def _unfit(self, batch: Any) -> str | None:
        if self.check is not None and self.check.failed():
            return DIFFERENT
        bs = batch.batch_size
        if not bs:
            return NO_REQUESTS
        if batch.seq_lens_cpu is None:
            return NO_HOST_LENGTHS
        if not have_size(bs, batch.seq_lens, batch.req_pool_indices, batch.extend_seq_lens):
            return OTHER_SIZES
        if batch.extend_num_tokens != bs * self.backend.speculative_num_draft_tokens:
            return OTHER_WIDTH
        return None

    def _rows_of_forward(self, batch: Any) -> int:
        """With DP attention the forward may have more rows than the batch: those get length 0."""
        if batch.global_num_tokens_cpu is None:
            return int(batch.extend_num_tokens)
        return max(int(batch.extend_num_tokens), int(self._padded_tokens(batch)))

    def _page_tables(self, lengths: Lengths, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The table of tokens and that of pages; one table where a page is a token."""
        width = min(longest, self.backend.req_to_token.shape[1])
        page = self.backend.real_page_size
        # In whole vectors of four, which the kernel copies at once: nobody asks for the width of this
        # table. A row stride would not do: FlashInfer's top-k would get a contiguous copy in each layer.
        wide = self._wide.view(lengths.rows, -(-width // 4) * 4)
        return wide, wide if page == 1 else self._paged.view(lengths.rows, -(-width // page))

    def _derived(self, lengths: Lengths) -> dict[str, Any]:
        """SGLang's tables that are made from the lengths."""
        derived = {}
        if self._schedule is not None:
            derived["paged_mqa_schedule_metadata"] = self._schedule(
                lengths.fields[self.names.seqlens_expanded]
            )
        if getattr(self.backend, self.names.decode_impl) == "flashmla_kv":
            derived["flashmla_metadata"] = self.backend._compute_flashmla_metadata(
                cache_seqlens=lengths.outputs["nsa_cache_seqlens"], seq_len_q=1
            )
        return derived

    def _allocate(self, bs: int, rows: int, rows_of_forward: int) -> Lengths:
        backend, names = self.backend, self.names

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=backend.req_to_token.device)

        outputs = {
            "cache_seqlens": empty(bs),
            "cu_seqlens_k": empty(bs + 1),
            "seqlens_expanded": empty(rows_of_forward),
            "nsa_cache_seqlens": empty(rows_of_forward),
            "nsa_cu_seqlens_k": empty(rows_of_forward + 1),
        }
        expanded = outputs["seqlens_expanded"][:rows]
        fields = {
            "page_size": backend.real_page_size,
            "cache_seqlens_int32": outputs["cache_seqlens"],
            "cu_seqlens_k": outputs["cu_seqlens_k"],
            "cu_seqlens_q": backend.get_device_int32_arange(rows + 1),
            "max_seq_len_q": 1,
            names.seqlens_expanded: expanded,
            names.cache_seqlens: outputs["nsa_cache_seqlens"],
            names.cu_seqlens_k: outputs["nsa_cu_seqlens_k"],
            names.cu_seqlens_q: backend.get_device_int32_arange(rows_of_forward + 1),
            names.max_seqlen_q: 1,
        }
        if self._schedule is not None and hasattr(self._metadata, CTX_LENS):
            fields[CTX_LENS] = expanded.view(-1, 1)
        return Lengths(rows_of_forward, outputs, fields)


@dataclasses.dataclass
class Lengths:
    """What a step of one shape fills beside the page tables, and what SGLang is told about it.

    Attributes:
        rows: of the fill; those behind the rows of the batch are padding.
        outputs: the tensors by their names in :class:`FillArgs`.
        fields: of the metadata object, those that are the same in every step of this shape.
        checked: whether FillArgs has seen tensors of this shape.
    """

    rows: int
    outputs: dict[str, torch.Tensor]
    fields: dict[str, Any]
    checked: bool = False


class PageTable:
    """Memory for the page table of the current step.

    Widths differ from step to step, so tables are cut out of one piece of memory. It grows with the
    largest batch, an eighth ahead, to about what SGLang allocates for that batch: its table of the
    requests and, repeated, that of the rows. Memory for the largest possible batch would be gigabytes,
    which a server has given to its KV cache. What no step has written yet is slot 0, SGLang's padding.
    """

    def __init__(self, device: torch.device) -> None:
        self._cells = torch.zeros(0, dtype=torch.int32, device=device)

    def view(self, rows: int, width: int) -> torch.Tensor:
        """A contiguous table [rows, width] that holds what earlier steps left there."""
        size = rows * width
        if size > self._cells.shape[0]:
            self._cells = self._cells.new_zeros(size + size // 8)
        return self._cells.as_strided((rows, width), (width, 1))


def run(bind: Callable[[FillArgs], Callable[[], None]], shape: Any, **tensors: Any) -> None:
    """Fills once. The tensors are checked once for each shape, whose ``checked`` says so.

    SGLang hands over new input tensors in each step. Checking takes ten times as long as binding and
    launching.
    """
    if shape.checked:
        args = object.__new__(FillArgs)
        vars(args).update(tensors)
    else:
        args = FillArgs(**tensors)
        shape.checked = True
    bind(args)()


def have_size(size: int, *tensors: torch.Tensor) -> bool:
    """What :func:`run` relies on once it has checked a shape."""
    return all(tensor.shape[0] == size for tensor in tensors)


def set_prefill_impl(backend: Any, names: Names, batch: Any) -> None:
    """SGLang's choice for the batch, where it can change something: it takes longer than a launch."""
    if backend.use_mha or backend.enable_auto_select_prefill_impl:
        getattr(backend, names.set_prefill_impl)(batch)


def plans_2d(module: ModuleType) -> bool:
    """Whether DeepGEMM's context lengths are [rows, 1] here, as they are since 0.5.12."""
    return hasattr(module, "_to_2d_context_lens")


def schedule_of(module: ModuleType) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """SGLang's call of DeepGEMM for lengths [rows], or None where it makes none."""
    from sglang.srt.utils import is_cuda

    if not is_cuda() or importlib.util.find_spec("deep_gemm") is None:
        return None
    deep_gemm = importlib.import_module("deep_gemm")
    shape = (-1, 1) if plans_2d(module) else (-1,)
    return lambda lengths: deep_gemm.get_paged_mqa_logits_metadata(
        lengths.view(shape), SCHEDULE_BLOCK, deep_gemm.get_num_sms()
    )
