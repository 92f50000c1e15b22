"""Replays of a backend that the in-graph adapter took over, beside SGLang's own fill.

Two of SGLang's real backend objects share their inputs. One is taken over and replayed: a CUDA graph on
a GPU; on the CPU, what the graph would hold is run again. The other is filled by SGLang's own code.
Every live value of every tensor is compared.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import fields, taken_over
from sglang_nsa_plugin.adapters.captured_fill import BackendFills, GraphFill
from sglang_nsa_plugin.harness.diff import Diff, compare_captured
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.harness.pair import BackendPair
from sglang_nsa_plugin.harness.sglang_kernel import sglang_fused_fill
from sglang_nsa_plugin.self_test import POISON
from sglang_nsa_plugin.state import STATES


class GraphPair(BackendPair[GraphBackend]):
    """:class:`BackendPair` with a captured fill for each of the batch sizes."""

    make_backend = GraphBackend

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
        taken_over.hand_back(backend)

    def bucket(self, raw_bs: int) -> int:
        """The smallest captured batch size that holds so many requests."""
        return next(bs for bs in self.batch_sizes if bs >= raw_bs)

    def step(self, bs: int, diff: Diff) -> None:
        """One replay of the taken-over backend and one fill by SGLang of the batch in ``inputs``."""
        metadata = self.metadata(bs)
        tensors = fields.read(metadata, fields.DSA, (*fields.LENGTHS, "ctx_lens"))
        if self.fills().kpool is not None:
            tensors |= fields.read_kpool(metadata)
        for tensor in tensors.values():
            if tensor is not None:
                tensor.fill_(POISON)
        self.replay(bs)
        self.theirs.sglang_fill(bs)
        self.compare(bs, diff)

    def compare(self, bs: int, diff: Diff) -> None:
        """Compares what the metadata of both backends holds now."""
        for mine, other in zip(self.ours.metadata(bs), self.theirs.metadata(bs), strict=True):
            compare_captured(mine, other, diff)

    def replay(self, bs: int) -> None:
        """What the runner does before, in and after a replay."""
        self.ours.replay(bs)
        self.replay_graph(bs)
        if self.fills().role.ends_step:
            with self.stub_process():
                self.fills().read_done(bs)

    def replay_graph(self, bs: int) -> None:
        """Replays the graph of this batch size; on the CPU, runs again what it would hold."""
        self._replays[bs]()

    def metadata(self, bs: int) -> Any:
        """SGLang's metadata object of the taken-over backend, whose tensors the graph fills."""
        return self.ours.metadata(bs)[0]

    def recording(self, bs: int) -> Callable[[], None]:
        """What the graph of this batch size holds: the fill and the tables derived from it.

        The metadata keeps the top-k plan of the graph that is replayed.
        """
        batch, metadata = self.ours.capture_batch(bs), self.metadata(bs)

        def record() -> None:
            plan = getattr(metadata, fields.TOPK_PLAN, None)
            self.ours.backend.init_forward_metadata_in_graph(batch)
            object.__setattr__(metadata, fields.TOPK_PLAN, plan)

        return record

    def before_replay(self, bs: int) -> Callable[[], None]:
        """The runner's call before a replay of the taken-over backend, for :meth:`stub_process`."""
        view = self.ours.replay_view(bs)
        return lambda: self.ours.backend.init_forward_metadata_out_graph(view)

    def sglang_before_replay(self, bs: int) -> Callable[[], None]:
        """The same call of SGLang's own code, on the untouched backend."""
        backend, view = self.theirs.backend, self.theirs.replay_view(bs)
        original = inspect.unwrap(type(backend).init_forward_metadata_out_graph)
        return lambda: original(backend, view)

    def sglang_kernel(self, bs: int, with_page_table_1: bool = True) -> Callable[[], None]:
        """SGLang's own fill kernel alone, into the untouched backend's tensors."""
        theirs = self.theirs
        (metadata,) = theirs.metadata(bs)
        if not with_page_table_1:
            metadata = dataclasses.replace(metadata, page_table_1=None)
        return lambda: sglang_fused_fill(
            metadata, self.inputs, bs, theirs.draft_tokens, theirs.index_topk, theirs.page_size
        )

    def shadow_report(self) -> list[int]:
        """What the shadow checks have found so far, in the order of ``shadow.Field``; waits for them."""
        shadowed = self.fills().shadowed
        if shadowed is None:
            raise RuntimeError("check_every: must be 1 or more for a report, got 0")
        values: list[int] = shadowed.check.report.on_device.tolist()
        return values

    def fills(self) -> BackendFills:
        """The plugin's fills of the backend that it took over."""
        fills: BackendFills | None = getattr(self.ours.backend, taken_over.ATTRIBUTE, None)
        if fills is None:
            reason = STATES[self.ours.role].reason
            raise RuntimeError(f"the plugin did not take over SGLang's backend: {reason}")
        return fills

    def captured(self, bs: int) -> GraphFill:
        """The fill of this batch size."""
        return self.fills().captured[bs]

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
