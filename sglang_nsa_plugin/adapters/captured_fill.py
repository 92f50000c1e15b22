"""The fills of a backend: recorded in a graph once, validated at replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sglang_nsa_plugin import dispatch, options
from sglang_nsa_plugin.adapters import by_request, fields, kpool, mqa_schedule
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason, count_fallback
from sglang_nsa_plugin.adapters.no_op import NoOp
from sglang_nsa_plugin.adapters.outcome import Outcome
from sglang_nsa_plugin.adapters.roles import Inputs, Role
from sglang_nsa_plugin.adapters.shadow_check import ShadowedReplays
from sglang_nsa_plugin.containment import attempt, described
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kpool_args import KPoolArgs
from sglang_nsa_plugin.log import logger_of

logger = logger_of(__name__)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # seq_lens, req_pool_indices, req_to_token
# What a replay on the fast path compares and serves:
# - of the same objects and of new slices: ForwardMode, seq_lens, req_pool_indices (of slices their
#   addresses), whether they are slices, req_to_token, SGLang's metadata, the ReplayCount, `no_op`
# - of copied inputs: the backend, req_to_token, SGLang's metadata, the ReplayCount
Hit = tuple[Any, ...]


class CaptureError(RuntimeError):
    """The fill failed while SGLang captured a graph, which cannot be captured any more."""

    def __init__(self, role: str, batch_size: int, error: Exception) -> None:
        super().__init__(
            f"the {role} fill of batch size {batch_size} failed inside SGLang's capture: "
            f"{type(error).__name__}: {error}. Start with {options.FLAG} off to serve with SGLang's "
            "own fill"
        )


class GraphFill:
    """The fill of one batch size.

    Attributes:
        metadata: SGLang's object whose tensors are filled.
        args: those tensors, and the inputs whose addresses a graph captures.
        kpool_args: of a pooled index, the tensors of its second fill.
        run: the bound launch, or both where the index is pooled.
        read_done: the event recorded after it; None on the CPU, and where nothing asks for it.
    """

    def __init__(
        self,
        metadata: Any,
        args: FillArgs,
        run: Callable[[], None],
        has_read_done: bool,
        kpool_args: KPoolArgs | None = None,
    ) -> None:
        # SGLang's graphs have a page table, and a fill of one reads both
        assert args.req_pool_indices is not None
        assert args.req_to_token is not None
        self.metadata = metadata
        self.args = args
        self.kpool_args = kpool_args
        self.run = run
        self.read_done = _read_done(args.device) if has_read_done else None
        self._inputs = (args.seq_lens, args.req_pool_indices, args.req_to_token)
        self._addresses = _addresses(self._inputs)

    def reads(self, inputs: Tensors) -> bool:
        """Whether these are the captured tensors: same memory, read the same way."""
        return _addresses(inputs) == self._addresses and all(map(_alike, inputs, self._inputs))

    def holds(self, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor) -> bool:
        """Whether the captured tensors hold the same values now. Waits for the device."""
        return all(map(torch.equal, (seq_lens, req_pool_indices), self._inputs[:2]))


def _validate_ctx_lens(ctx_lens: torch.Tensor | None, rows: int, columns: int) -> None:
    wanted = (rows // columns, columns)
    if ctx_lens is not None and ctx_lens.shape != wanted:
        raise ValueError(
            f"paged_mqa_ctx_lens_2d: must be {list(wanted)}, as SGLang laid it out at the start, got "
            f"{list(ctx_lens.shape)}"
        )


def _validate_fields(metadata: Any, is_pooled: bool) -> None:
    unknown = fields.unknown_on_device(metadata, is_pooled)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: {type(metadata).__name__} has tensors here that the plugin does not "
            "know, and would leave as they were captured"
        )


def _addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _alike(given: torch.Tensor, captured: torch.Tensor) -> bool:
    """A runner captures a slice, and may replay the whole buffer."""
    return (
        given.dtype is captured.dtype
        and given.stride() == captured.stride()
        and given.shape[0] >= captured.shape[0]
    )


class BackendFills:
    """The fills of one backend for its role, one for each captured batch size.

    Captured fills read ``enabled`` on the device. A replay that the plugin cannot serve sets it to 0 and
    lets SGLang fill before the graph runs. Otherwise the fill in the graph would read the captured
    tensors and overwrite SGLang's values. ``enabled`` is allocated with the backend, outside the regions
    that SGLang's memory saver releases and hands back zeroed.

    Attributes:
        role: the plan that the backend makes.
        mode: SGLang's ForwardMode of that role. Batches are compared with it by identity, because
            asking the mode costs more.
        fast_path: by batch size, the inputs that were validated last. A replay with the same ones skips
            validation. Empty while the fill is switched off, and where each replay has more to do.
        no_op: launches an empty kernel right before a replay of the target's graph, while the GPU is
            busy with the step before. None for other graphs, and after it failed once.
        columns: of DeepGEMM's context lengths; more than one where they go by requests.
        remainder_last: of DeepGEMM's schedule; None leaves the schedule to DeepGEMM.
        drops_wide_tables: whether graphs do without the wide page table where nothing reads it.
    """

    def __init__(
        self,
        backend: Any,
        role: Role,
        choice: dispatch.Choice,
        check_every: int,
        outcome: Outcome,
        drops_wide_tables: bool = True,
    ) -> None:
        self.backend = backend
        self.role = role
        (self.mode,) = role.modes()
        self.bind = choice.bind
        # The second fill of a model that pools the keys of its index.
        is_pooled = kpool.is_pooled(backend)
        self.kpool = kpool.KPoolFill(backend, role, choice.bind_kpool) if is_pooled else None
        self.outcome = outcome
        self.drops_wide_tables = drops_wide_tables
        self.columns = by_request.columns_of(backend, role)
        self.remainder_last = by_request.remainder_last(backend, self.columns, choice)
        self.captured: dict[int, GraphFill] = {}
        self.fast_path: dict[int, Hit] = {}
        self.no_op = self._no_op(choice)
        self.enabled = torch.ones(1, dtype=torch.int32, device=backend.req_to_token.device)
        self.is_enabled = True
        # Whether the runner copies a batch's inputs; None until a batch has shown it.
        self._is_copied: bool | None = None
        self._bytes_saved = 0
        self.shadowed = ShadowedReplays(backend, check_every, outcome) if check_every else None

    def _no_op(self, choice: dispatch.Choice) -> NoOp | None:
        """It is of no use to the values: an error ends it and nothing else."""
        if choice.bind_no_op is None or not self.role.is_of_target:
            return None
        return NoOp(choice.bind_no_op(self.backend.req_to_token.device), self._end_no_op)

    def _end_no_op(self, error: Exception) -> None:
        self.no_op = None
        self.fast_path.clear()
        logger.warning(
            "sglang-nsa-plugin: the empty kernel before replays of %s's graph, or the query before it, "
            "failed. It is left out from now on: %s. Beside another process on the GPU steps may be "
            "longer; nothing else changes",
            self.role.name,
            described(error),
        )

    def forget(self) -> None:
        """SGLang allocates new graph tensors: drops the captured fills of the old ones."""
        self.captured.clear()
        self.fast_path.clear()
        if self.shadowed is not None:
            self.shadowed.forget()

    def count_saved(self, page_table_bytes: int) -> None:
        """Counts what this backend's graphs do without, each time that SGLang has allocated for them."""
        self.role.state.bytes_saved += page_table_bytes - self._bytes_saved
        self._bytes_saved = page_table_bytes

    def drop_last_check(self) -> None:
        """SGLang captures again: what the last replay filled is written over before it is compared."""
        if self.shadowed is not None:
            self.shadowed.drop()

    def retire(self) -> None:
        """Leaves every batch size to SGLang for good; graphs captured so far still read ``enabled``."""
        self._switch(on=False)

    def record(self, batch: Any) -> None:
        """Runs the fill and the derived tables on the current stream, which may be capturing."""
        self._run(self._captured(batch))
        if is_capturing():
            self.role.state.captures.add(batch.batch_size)

    def leave_to_sglang(self, reason: FallbackReason) -> bool:
        """SGLang fills the replay that comes now. Returns False, for "not filled"."""
        if self.is_enabled:
            self._switch(on=False)
        count_fallback(reason, self.role.state)
        return False

    def _run(self, captured: GraphFill) -> None:
        captured.run()
        if captured.read_done is not None:
            captured.read_done.record()
        self.refresh_derived(captured.metadata)

    def validate(self, captured: GraphFill, batch: Any) -> bool:
        """Whether the captured fill serves this batch; switches the fill on or off to match."""
        if self.shadowed is not None and self.shadowed.check.failed():  # told while off, too
            return self.leave_to_sglang(FallbackReason.DIFFERENCE_FOUND)
        if not self.outcome.is_switched_on:
            return self.leave_to_sglang(FallbackReason.SWITCHED_OFF)
        inputs = (batch.seq_lens, batch.req_pool_indices, self.backend.req_to_token)
        if not self._serves(captured, inputs) or not self._serves_kpool(captured, batch):
            return self.leave_to_sglang(FallbackReason.INPUTS_REPLACED)
        if not self.is_enabled:
            self._switch(on=True)
        if self._skips_validation(captured):
            self.fast_path[batch.batch_size] = self._hit(inputs, captured.metadata)
        return True

    def _serves(self, captured: GraphFill, inputs: Tensors) -> bool:
        """Whether the captured tensors hold these inputs.

        Whether a runner copies them is found out with its first batch of other tensors. The host waits
        for the device that once.
        """
        if captured.reads(inputs):
            return True
        if self.role.inputs is not Inputs.COPIED or inputs[2] is not captured.args.req_to_token:
            return False
        if self._is_copied is None:
            self._is_copied = captured.holds(*inputs[:2])
        return self._is_copied

    def _serves_kpool(self, captured: GraphFill, batch: Any) -> bool:
        """The same of what the second fill reads besides."""
        if self.kpool is None or captured.kpool_args is None:
            return True
        return self.kpool.serves(captured.kpool_args, batch)

    def _skips_validation(self, captured: GraphFill) -> bool:
        """Whether a replay like the last one needs nothing but its metadata."""
        if self.shadowed is not None:
            return False
        if captured.kpool_args is not None and captured.kpool_args.accept_lens is not None:
            return False  # the accepted tokens are another object in each replay
        if self.role.inputs is Inputs.COPIED:
            return bool(self._is_copied)
        return not self.backend.enable_auto_select_prefill_impl

    def _hit(self, inputs: Tensors, metadata: Any) -> Hit:
        seq_lens, req_pool_indices, req_to_token = inputs
        count = self.role.state.count
        if self.role.inputs is Inputs.COPIED:
            return self.backend, req_to_token, metadata, count
        are_slices = self.role.inputs is Inputs.NEW_SLICES
        batch = (seq_lens, req_pool_indices)
        known = _addresses(batch) if are_slices else batch
        return self.mode, *known, are_slices, req_to_token, metadata, count, self.no_op

    def read_done(self, bs: int) -> torch.cuda.Event | None:
        """To be called after a replay: the event after which nothing of it reads ``req_to_token``.

        None where SGLang fills this batch size, and on the CPU. Runs the shadow check where one is due.
        """
        captured = self.captured.get(bs)
        if captured is None:
            return None
        shadowed = self.shadowed
        sglang_read_done = None if shadowed is None else attempt(shadowed.run, shadowed.check.stop)
        return sglang_read_done or captured.read_done

    def metadata_of(self, batch: Any) -> Any:
        """SGLang's metadata object of this batch size."""
        table = self.backend.decode_cuda_graph_metadata
        key = fields.graph_key(table, batch.batch_size, self.mode)
        if key not in table:
            raise ValueError(
                f"decode_cuda_graph_metadata: must have the batch size {batch.batch_size} or it and "
                f"{self.mode.name} among its keys, got {', '.join(map(str, table))}"
            )
        return table[key]

    def _captured(self, batch: Any) -> GraphFill:
        metadata = self.metadata_of(batch)
        captured = self.captured.get(batch.batch_size)
        if captured is None or captured.metadata is not metadata:
            captured = self._bound(batch, metadata)
            if self.shadowed is not None:
                self.shadowed.prepare(batch.batch_size, metadata)
            if not self.captured:
                self._rehearse(captured)
            self.captured[batch.batch_size] = captured
            self.fast_path.pop(batch.batch_size, None)
        return captured

    def _bound(self, batch: Any, metadata: Any) -> GraphFill:
        args = self._args(batch, metadata)
        run = self.bind(args)
        if self.kpool is None:
            return GraphFill(metadata, args, run, self.role.ends_step)
        kpool_args = self.kpool.args(batch, metadata, self.enabled)
        run_kpool = self.kpool.bind(kpool_args)

        def run_both() -> None:
            run()
            run_kpool()  # corrects the lengths of sparse attention, so it comes second

        return GraphFill(metadata, args, run_both, self.role.ends_step, kpool_args)

    def _rehearse(self, captured: GraphFill) -> None:
        """Records a graph and drops it: an error inside SGLang's own capture could not be undone."""
        if captured.args.device.type == "cpu" or is_capturing():
            return
        self._run(captured)  # compiles and loads what the capture needs
        graph = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        # a failed capture leaves its own stream current
        with torch.cuda.stream(torch.cuda.current_stream()), graph:
            self._run(captured)

    def _args(self, batch: Any, metadata: Any) -> FillArgs:
        backend, draft_tokens = self.backend, self.backend.speculative_num_draft_tokens
        rows = self.role.rows_per_request(draft_tokens)
        _validate_fields(metadata, self.kpool is not None)
        outputs = fields.read(metadata, fields.DSA, fields.DSA)
        # SGLang builds the context lengths as a view of the expanded lengths: one write serves both.
        ctx_lens = outputs["ctx_lens"]
        _validate_ctx_lens(ctx_lens, rows * batch.batch_size, self.columns)
        if ctx_lens is not None and ctx_lens.data_ptr() == outputs["seqlens_expanded"].data_ptr():
            outputs["ctx_lens"] = None
        if outputs["seqlens_expanded"] is outputs["cache_seqlens"]:  # with one row per request
            outputs["seqlens_expanded"] = None
        if metadata.page_size == 1:
            outputs["real_page_table"] = None  # it is page_table_1
        if self.remainder_last is None:
            outputs["mqa_schedule"] = None
        return FillArgs(
            seq_lens=batch.seq_lens,
            req_pool_indices=batch.req_pool_indices,
            req_to_token=backend.req_to_token,
            extend_lens=rows,
            length_offset=self.role.length_offset(draft_tokens),
            index_topk=backend.dsa_index_topk,
            page_size=metadata.page_size,
            **outputs,
            mqa_remainder_last=bool(self.remainder_last),
            enabled=self.enabled,
        )

    def refresh_derived(self, metadata: Any) -> None:
        """Runs SGLang's own functions for the tables that the fill does not write, in SGLang's order."""
        backend = self.backend
        if metadata.paged_mqa_schedule_metadata is not None and self.remainder_last is None:
            mqa_schedule.refresh(backend, metadata, metadata.paged_mqa_ctx_lens_2d)
        if getattr(metadata, fields.TOPK_PLAN, None) is not None:  # since 0.5.15
            # Not copied into the old plan: what is captured after this reads the new one.
            plan = backend._build_topk_v2_plan(seqlens_expanded=metadata.dsa_seqlens_expanded)
            object.__setattr__(metadata, "topk_v2_plan", plan)
        if self.kpool is not None:
            self.kpool.refresh_derived(metadata)
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
            self.fast_path.clear()
            # SGLang writes the running sums, but not the 0 before them.
            for captured in self.captured.values():
                captured.args.cu_seqlens_k[:1].zero_()
                captured.args.nsa_cu_seqlens_k[:1].zero_()


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read_done(device: torch.device) -> torch.cuda.Event | None:
    """An event that a captured graph records at every replay, right after the fill."""
    return torch.cuda.Event(external=True) if device.type == "cuda" else None
