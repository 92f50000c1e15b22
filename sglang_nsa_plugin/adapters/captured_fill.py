"""The fills of a draft-extend backend as graphs hold them: recorded once, checked at each replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sglang_nsa_plugin import dispatch
from sglang_nsa_plugin.adapters import mqa_schedule
from sglang_nsa_plugin.adapters.outcome import count_fallback
from sglang_nsa_plugin.adapters.shadow_check import DIFFERENT, ShadowedReplays
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.state import STATE

INPUTS_REPLACED = "input tensors are not the captured ones"

# What a replay looks at: ForwardMode, seq_lens, req_pool_indices, req_to_token and SGLang's metadata.
Ready = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, Any]


class GraphFill:
    """The fill of one batch size.

    Attributes:
        metadata: SGLang's object whose tensors are filled.
        args: those tensors, and the inputs whose addresses a graph captures.
        run: the bound launch.
        read_done: recorded behind the launch; None on the CPU.
    """

    def __init__(self, metadata: Any, args: FillArgs, run: Callable[[], None]) -> None:
        # a graph of SGLang's has a page table, which is read through both
        assert args.req_pool_indices is not None
        assert args.req_to_token is not None
        self.metadata = metadata
        self.args = args
        self.run = run
        self.read_done = _read_done(args.device)
        self._inputs = (args.seq_lens, args.req_pool_indices, args.req_to_token)
        self._addresses = _addresses(self._inputs)

    def reads(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> bool:
        """Whether these are the captured tensors: same memory, read the same way."""
        return _addresses(inputs) == self._addresses and all(map(_alike, inputs, self._inputs))


def _addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _alike(given: torch.Tensor, captured: torch.Tensor) -> bool:
    """The runner captures a slice and replays the whole buffer."""
    return (
        given.dtype is captured.dtype
        and given.stride() == captured.stride()
        and given.shape[0] >= captured.shape[0]
    )


class BackendFills:
    """The fills of one draft-extend backend, one for each captured batch size.

    Captured fills read ``enabled`` on the device. A replay that cannot be ours switches it off and lets
    SGLang fill before the graph runs; else the graph would write over SGLang's values from the tensors
    that it captured. It is allocated with the backend, outside the regions that SGLang's memory saver
    releases and hands back zeroed.

    Attributes:
        mode: SGLang's ForwardMode of draft-extend. A batch's is compared with it: that is quicker than
            to ask the mode itself.
        ready: by batch size, what the last batch had that was admitted. One with the same objects needs
            no second look. Empty while the fill is switched off, and where each replay has more to do.
    """

    def __init__(self, backend: Any, mode: Any, choice: dispatch.Choice, check_every: int = 0) -> None:
        self.backend = backend
        self.mode = mode
        self.bind = choice.bind
        # of DeepGEMM's schedule; None leaves it to DeepGEMM
        self.remainder_last = mqa_schedule.remainder_last(backend, choice.bind)
        self.captured: dict[int, GraphFill] = {}
        self.ready: dict[int, Ready] = {}
        self.enabled = torch.ones(1, dtype=torch.int32, device=backend.req_to_token.device)
        self.is_enabled = True
        self.checked = ShadowedReplays(backend, check_every) if check_every else None

    def forget(self) -> None:
        """SGLang allocates its graph tensors anew: captured fills of the old ones are void."""
        self.captured.clear()
        self.ready.clear()
        if self.checked is not None:
            self.checked.forget()

    def retire(self) -> None:
        """Leaves every batch size to SGLang for good; graphs captured so far still read ``enabled``."""
        self._switch(on=False)

    def record(self, batch: Any) -> None:
        """Runs the fill and the derived tables on the current stream, which may be capturing."""
        captured = self._captured(batch)
        self._run(captured)
        # on the CPU there are no graphs: there each fill counts as one that a graph would hold
        if captured.args.device.type == "cpu" or is_capturing():
            STATE.captures.add(batch.batch_size)

    def _run(self, captured: GraphFill) -> None:
        captured.run()
        if captured.read_done is not None:
            captured.read_done.record()
        self.refresh_derived(captured.metadata)

    def admits(self, captured: GraphFill, batch: Any) -> bool:
        """Whether the captured fill serves this batch. Switches it on or off where that is news."""
        if self.checked is not None and self.checked.check.failed():
            return self._leave_to_sglang(DIFFERENT)
        inputs = (batch.seq_lens, batch.req_pool_indices, self.backend.req_to_token)
        if not captured.reads(inputs):
            return self._leave_to_sglang(INPUTS_REPLACED)
        if not self.is_enabled:
            self._switch(on=True)
        if self.checked is None and not self.backend.enable_auto_select_prefill_impl:
            self.ready[batch.batch_size] = (self.mode, *inputs, captured.metadata)
        return True

    def read_done(self, bs: int) -> torch.cuda.Event | None:
        """Behind a replay of this batch size: the event after which nothing of it reads req_to_token.

        None where the fill is not ours, or on the CPU.
        """
        captured = self.captured.get(bs)
        if captured is None:
            return None
        checked = None if self.checked is None else self.checked.run()
        return checked or captured.read_done

    def _leave_to_sglang(self, why: str) -> bool:
        if self.is_enabled:
            self._switch(on=False)
        count_fallback(why)
        return False

    def _captured(self, batch: Any) -> GraphFill:
        metadata = self.backend.decode_cuda_graph_metadata[batch.batch_size]
        captured = self.captured.get(batch.batch_size)
        if captured is None or captured.metadata is not metadata:
            args = self._args(batch, metadata)
            captured = GraphFill(metadata, args, self.bind(args))
            if self.checked is not None:
                self.checked.prepare(batch.batch_size, metadata)
            if not self.captured:
                self._rehearse(captured)
            self.captured[batch.batch_size] = captured
            self.ready.pop(batch.batch_size, None)
        return captured

    def _rehearse(self, captured: GraphFill) -> None:
        """Records a graph that is thrown away: an error inside SGLang's own capture cannot be undone."""
        if captured.args.device.type == "cpu" or is_capturing():
            return
        self._run(captured)  # compiles and loads what it needs
        graph = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        # a capture that fails leaves its own stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream()), graph:
            self._run(captured)

    def _args(self, batch: Any, metadata: Any) -> FillArgs:
        backend = self.backend
        expanded, ctx_lens = metadata.dsa_seqlens_expanded, metadata.paged_mqa_ctx_lens_2d
        # SGLang builds the context lengths as a view of the expanded ones: one write serves both.
        if ctx_lens is not None and ctx_lens.data_ptr() == expanded.data_ptr():
            ctx_lens = None
        return FillArgs(
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=backend.speculative_num_draft_tokens,
            index_topk=backend.dsa_index_topk,
            page_size=metadata.page_size,
            cache_seqlens=metadata.cache_seqlens_int32,
            cu_seqlens_k=metadata.cu_seqlens_k,
            seqlens_expanded=expanded,
            nsa_cache_seqlens=metadata.dsa_cache_seqlens_int32,
            nsa_cu_seqlens_k=metadata.dsa_cu_seqlens_k,
            ctx_lens=ctx_lens,
            page_table_1=metadata.page_table_1,
            real_page_table=metadata.real_page_table if metadata.page_size > 1 else None,
            mqa_schedule=None if self.remainder_last is None else metadata.paged_mqa_schedule_metadata,
            mqa_remainder_last=bool(self.remainder_last),
            enabled=self.enabled,
        )

    def refresh_derived(self, metadata: Any) -> None:
        """What the fill leaves to SGLang's own functions, in the order of its own fill."""
        backend = self.backend
        if metadata.paged_mqa_schedule_metadata is not None and self.remainder_last is None:
            backend._refresh_paged_mqa_schedule_metadata(metadata, metadata.paged_mqa_ctx_lens_2d)
        if metadata.topk_v2_plan is not None:
            # The plan itself, not a copy: what the graph holds behind this reads the new one.
            plan = backend._build_topk_v2_plan(metadata.dsa_seqlens_expanded)
            object.__setattr__(metadata, "topk_v2_plan", plan)
        if metadata.flashmla_metadata is not None:
            metadata.flashmla_metadata.copy_(
                backend._compute_flashmla_metadata(
                    cache_seqlens=metadata.dsa_cache_seqlens_int32, seq_len_q=1
                )
            )

    def _switch(self, on: bool) -> None:
        self.enabled.fill_(int(on))
        self.is_enabled = on
        if not on:
            self.ready.clear()
            # SGLang writes the running sums behind this 0, not the 0.
            for captured in self.captured.values():
                captured.args.cu_seqlens_k[:1].zero_()
                captured.args.nsa_cu_seqlens_k[:1].zero_()


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read_done(device: torch.device) -> torch.cuda.Event | None:
    """An event that a captured graph records again at every replay, right behind the fill."""
    return torch.cuda.Event(external=True) if device.type == "cuda" else None
