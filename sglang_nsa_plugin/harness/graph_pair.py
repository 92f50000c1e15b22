"""Replays of a draft-extend backend that the plugin took over, beside SGLang's own fill.

Two of SGLang's real backend objects share their inputs: one is taken over by the in-graph adapter and
replayed (a CUDA graph on a GPU; on the CPU what the graph would hold is run again), the other is filled
by SGLang's own code. Every live value of every tensor is compared.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import in_graph
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, GraphFill
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.harness.pair import BackendPair
from sglang_nsa_plugin.harness.sglang_kernel import sglang_fused_fill
from sglang_nsa_plugin.self_test import POISON
from sglang_nsa_plugin.state import STATE

LENGTHS = {  # our name: SGLang's field
    "cache_seqlens": "cache_seqlens_int32",
    "cu_seqlens_k": "cu_seqlens_k",
    "seqlens_expanded": "dsa_seqlens_expanded",
    "nsa_cache_seqlens": "dsa_cache_seqlens_int32",
    "nsa_cu_seqlens_k": "dsa_cu_seqlens_k",
    "ctx_lens": "paged_mqa_ctx_lens_2d",
}
TABLES = ("page_table_1", "real_page_table")


class Comparison:
    """Counts of values that were compared and that differed, by tensor, and the first difference."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.first: str | None = None

    def add(self, name: str, ours: torch.Tensor, theirs: torch.Tensor, live: torch.Tensor) -> None:
        """Compares the cells where ``live`` holds."""
        wrong = (ours != theirs) & live
        self.compared[name] += int(live.sum())
        count = int(wrong.sum())
        self.different[name] += count
        if count and self.first is None:
            where = tuple(wrong.nonzero()[0].tolist())
            self.first = f"{name}{list(where)}: SGLang {int(theirs[where])}, ours {int(ours[where])}"


class GraphPair(BackendPair[GraphBackend]):
    """:class:`BackendPair` with a captured fill for each of the batch sizes."""

    make_rig = GraphBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replays: dict[int, Callable[[], None]] = {}
        for one in (self.ours, self.theirs):
            one.init_state()
        for bs in self.batch_sizes:
            self.ours.capture_setup(bs)
            self.theirs.capture_setup(bs)
            self._replays[bs] = self._capture(bs)

    def _hand_back(self, backend: Any) -> None:
        in_graph.hand_back(backend)

    def bucket(self, raw_bs: int) -> int:
        """The smallest captured batch size that holds so many requests."""
        return next(bs for bs in self.batch_sizes if bs >= raw_bs)

    def step(self, bs: int, result: Comparison) -> None:
        """One replay of ours and one fill of SGLang's for the batch in ``inputs``, compared."""
        ours = self.ours.backend.decode_cuda_graph_metadata[bs]
        theirs = self.theirs.backend.decode_cuda_graph_metadata[bs]
        for field in LENGTHS.values():
            if getattr(ours, field) is not None:
                getattr(ours, field).fill_(POISON)
        self.replay(bs)
        self.theirs.sglang_fill(bs)
        compare(ours, theirs, result)

    def replay(self, bs: int) -> None:
        """What the runner does before, in and behind a replay."""
        self.ours.replay(bs)
        self._replays[bs]()
        with self.stub_process():
            self._taken_over().read_done(bs)

    def metadata(self, bs: int) -> Any:
        """SGLang's metadata object of our backend, whose tensors the graph fills."""
        return self.ours.backend.decode_cuda_graph_metadata[bs]

    def recording(self, bs: int) -> Callable[[], None]:
        """What is recorded in the graph of this batch size: the fill and all that is made of it.

        The metadata keeps the top-k plan of the graph that is replayed.
        """
        batch, metadata = self.ours.capture_batch(bs), self.metadata(bs)

        def record() -> None:
            plan = metadata.topk_v2_plan
            self.ours.backend.init_forward_metadata_in_graph(batch)
            object.__setattr__(metadata, "topk_v2_plan", plan)

        return record

    def before_replay(self, bs: int) -> Callable[[], None]:
        """The runner's call before a replay of our backend. Call it inside :meth:`stub_process`."""
        view = self.ours.replay_view(bs)
        return lambda: self.ours.backend.init_forward_metadata_out_graph(view)

    def sglang_before_replay(self, bs: int) -> Callable[[], None]:
        """The same call of SGLang's own code, on the untouched backend."""
        backend, view = self.theirs.backend, self.theirs.replay_view(bs)
        original = inspect.unwrap(type(backend).init_forward_metadata_out_graph)
        return lambda: original(backend, view)

    def sglang_kernel(self, bs: int, wide: bool = True) -> Callable[[], None]:
        """SGLang's own fill kernel alone, into the untouched backend's tensors; wide or not."""
        rig = self.theirs
        metadata = rig.backend.decode_cuda_graph_metadata[bs]
        if not wide:
            metadata = dataclasses.replace(metadata, page_table_1=None)
        return lambda: sglang_fused_fill(
            metadata, self.inputs, bs, rig.draft_tokens, rig.index_topk, rig.page_size
        )

    def shadow_report(self) -> list[int]:
        """What the shadow checks have found so far, in the order of ``shadow.Field``; waits for them."""
        checked = self._taken_over().checked
        if checked is None:
            raise RuntimeError("check_every: was 0, so nothing was checked")
        values: list[int] = checked.check.report.on_device.tolist()
        return values

    def _taken_over(self) -> BackendFills:
        fill = getattr(self.ours.backend, in_graph.ATTRIBUTE, None)
        if fill is None:
            raise RuntimeError(f"the plugin did not take over SGLang's backend: {STATE.reason}")
        taken: BackendFills = fill
        return taken

    def _captured(self, bs: int) -> GraphFill:
        return self._taken_over().captured[bs]

    def _capture(self, bs: int) -> Callable[[], None]:
        batch, record = self.ours.capture_batch(bs), self.ours.backend.init_forward_metadata_in_graph
        for _ in range(2):  # warm-up, as SGLang's graph backend does
            record(batch)
        if self.inputs.seq_lens.device.type == "cpu":
            return lambda: record(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            record(batch)
        return graph.replay


def compare(ours: Any, theirs: Any, result: Comparison) -> None:
    """Compares SGLang's metadata object of one batch size with another: live values only.

    Cells of a page table at and past a request's length hold whatever they held.
    """
    for name, field in LENGTHS.items():
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine is not None:
            result.add(name, mine, other, torch.ones_like(mine, dtype=torch.bool))
    rows = theirs.dsa_seqlens_expanded.shape[0]
    length = theirs.cache_seqlens_int32.repeat_interleave(rows // theirs.cache_seqlens_int32.shape[0])
    for name in TABLES:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine is None or (name == "real_page_table" and ours.page_size == 1):
            continue
        page = 1 if name == "page_table_1" else ours.page_size
        column = torch.arange(0, mine.shape[1] * page, page, device=mine.device)
        result.add(name, mine, other, column < length[:, None])
    for name, mine, other in _derived(ours, theirs):
        result.add(name, mine, other, torch.ones_like(mine, dtype=torch.bool))


def _derived(ours: Any, theirs: Any) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """What SGLang's own functions make of the lengths, on a GPU; for ours, inside the graph."""
    if ours.paged_mqa_schedule_metadata is not None:
        name = "paged_mqa_schedule_metadata"
        yield name, ours.paged_mqa_schedule_metadata, theirs.paged_mqa_schedule_metadata
    if ours.topk_v2_plan is not None and _plan_is_written(theirs.dsa_seqlens_expanded):
        yield "topk_v2_plan", _plan(ours.topk_v2_plan), _plan(theirs.topk_v2_plan)
    if ours.flashmla_metadata is not None:
        mine, other = ours.flashmla_metadata, theirs.flashmla_metadata
        # the last of a part's eight numbers is padding, which FlashMLA leaves as it was
        yield "flashmla_metadata", mine.flashmla_metadata[:, :7], other.flashmla_metadata[:, :7]
        yield "flashmla num_splits", mine.num_splits, other.num_splits


def _plan_is_written(lengths: torch.Tensor) -> bool:
    """From 0.5.21 on SGLang leaves plans that nobody reads as they were: those of few rows."""
    try:
        from sglang.kernels.ops.attention.dsv4.topk import topk_v2_plan_is_written
    except ImportError:
        return True
    return bool(topk_v2_plan_is_written(lengths))


def _plan(plan: torch.Tensor) -> torch.Tensor:
    """The defined part of a top-k plan [rows + 1, 2] in a fixed order.

    Row 0 holds the threshold and a count, the next ``count`` rows the long items in any order.
    """
    items = plan[1 : 1 + int(plan[0, 1])]
    return torch.cat([plan[:1], items[items[:, 0].argsort()]])
