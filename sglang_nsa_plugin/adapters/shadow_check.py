"""The shadow check: every Nth step SGLang fills a copy of the metadata, and a kernel compares both."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch

from sglang_nsa_plugin import shadow
from sglang_nsa_plugin.shadow import Comparison, Difference, Field, Pair, Report
from sglang_nsa_plugin.state import STATE

logger = logging.getLogger(__name__)

DIFFERENT = "the shadow check found a difference"
# Metadata fields that hold one number a request, a row or an SM, without their prefix of nsa_ or dsa_.
PREFIXED = ("seqlens_expanded", "cache_seqlens_int32", "cu_seqlens_k")
TABLES = ("page_table_1", "real_page_table")
# A part of FlashMLA's work has eight numbers, of which the last is padding that is never written.
FLASHMLA_NUMBERS = 7


def found_difference() -> bool:
    """Whether a shadow check of this process has found one: SGLang then fills for all its backends."""
    return STATE.first_mismatch is not None


class ShadowCheck:
    """Counts steps, runs the comparison of each Nth one, and takes notice of what it found.

    Nothing waits for the device: what a comparison found is known some steps later. From then on
    :meth:`failed` is true and SGLang has to fill.

    Raises:
        RuntimeError: the library that compares does not run on this device.
    """

    def __init__(self, every: int, device: torch.device) -> None:
        why_not = shadow.unavailable(device)
        if why_not is not None:
            raise RuntimeError(f"the shadow check cannot run: {why_not}")
        self.report = Report(device)
        self._every = every
        self._steps = 0
        self._latest: Comparison | None = None
        self._values = 0

    def is_due(self) -> bool:
        """Whether the step that is being planned is to be checked."""
        self._steps += 1
        return self._steps % self._every == 0

    def run(self, comparison: Comparison) -> None:
        """Compares on the current stream."""
        comparison.run()
        self._latest = comparison
        STATE.checks += 1

    def failed(self) -> bool:
        """Whether a difference has become known; the first time it is logged and counted."""
        if not found_difference() and self._latest is not None and self.report.arrived():
            values = self.report.values[Field.VALUES]
            STATE.values_checked += values - self._values
            self._values = values
            difference = self._latest.difference()
            if difference is not None:
                self._tell(difference)
        return found_difference()

    def _tell(self, difference: Difference) -> None:
        STATE.mismatches += difference.count
        STATE.first_mismatch = str(difference)
        logger.error(
            "sglang-nsa-plugin %s: the shadow check found a difference: %s. SGLang %s, adapter %s, "
            "implementation %s. From now on this process serves through SGLang's own fill; please "
            "report this line",
            version("sglang-nsa-plugin"),
            difference,
            version("sglang"),
            STATE.adapter,
            STATE.backend,
        )


class Scratch:
    """Copies of the metadata of captured batch sizes for SGLang's own fill.

    Their page tables share memory: one check is over, in the order of the stream, before the next one
    fills them.
    """

    def __init__(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}

    def like(self, metadata: Any) -> Any:
        """A metadata object with tensors of its own, the same shapes; equal objects stay one object."""
        copies: dict[int, Any] = {}
        changed = {}
        for field in dataclasses.fields(metadata):
            value = getattr(metadata, field.name)
            if isinstance(value, torch.Tensor) or dataclasses.is_dataclass(value):
                if id(value) not in copies:
                    copies[id(value)] = self._copy(field.name, value)
                changed[field.name] = copies[id(value)]
        return dataclasses.replace(metadata, **changed)

    def _copy(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            parts = {f.name: getattr(value, f.name).clone() for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        if name not in TABLES:
            return value.clone()
        room = self._tables.get(name)
        if room is None or room.numel() < value.numel():
            room = self._tables[name] = torch.zeros(
                value.numel(), dtype=value.dtype, device=value.device
            )
        return room[: value.numel()].view(value.shape)


class ShadowedReplays:
    """Every Nth replay of one backend beside SGLang's own fill.

    The replay fills its metadata inside the graph, so SGLang fills a copy behind it, from inputs that
    stay as they are until the next step, and ``req_to_token`` until the event that :meth:`run` returns.
    """

    def __init__(self, backend: Any, every: int) -> None:
        self.backend = backend
        self.check = ShadowCheck(every, backend.req_to_token.device)
        self._scratch = Scratch()
        self._copies: dict[int, tuple[Any, Comparison]] = {}
        self._planned: tuple[Any, Callable[[Any, Any], object]] | None = None

    def forget(self) -> None:
        """The captured metadata is void, and its copies with it."""
        self._copies.clear()
        self._planned = None

    def prepare(self, bs: int, metadata: Any) -> None:
        """Makes the copy of one batch size, so that nothing is allocated in service."""
        copy = self._scratch.like(metadata)
        self._copies[bs] = copy, compare(metadata, copy, "dsa", self.check)

    def plan(self, batch: Any, sglang_fill: Callable[[Any, Any], object]) -> None:
        """Before the replay of a batch: whether it is one to check."""
        self._planned = (batch, sglang_fill) if self.check.is_due() else None

    def run(self) -> torch.cuda.Event | None:
        """Behind the replay: SGLang's fill into the copy, and the comparison, where one was planned."""
        if self._planned is None:
            return None
        (batch, sglang_fill), self._planned = self._planned, None
        backend, bs = self.backend, batch.batch_size
        copy, comparison = self._copies[bs]
        metadata = backend.decode_cuda_graph_metadata[bs]
        backend.decode_cuda_graph_metadata[bs] = copy
        try:
            sglang_fill(backend, batch)
        finally:
            backend.decode_cuda_graph_metadata[bs] = metadata
            backend.forward_metadata = metadata
        read_done = _event_now(backend.req_to_token.device)
        self.check.run(comparison)
        return read_done


def compare(ours: Any, theirs: Any, prefix: str, check: ShadowCheck) -> Comparison:
    """Binds the comparison of two metadata objects with the same number of rows for each request."""
    return Comparison(list(_pairs(ours, theirs, prefix)), theirs.cache_seqlens_int32, check.report)


def _pairs(ours: Any, theirs: Any, prefix: str) -> Iterator[Pair]:
    lengths = [
        "cache_seqlens_int32",
        "cu_seqlens_k",
        *(f"{prefix}_{name}" for name in PREFIXED),
        "paged_mqa_ctx_lens_2d",
        "paged_mqa_schedule_metadata",
    ]
    for name in lengths:
        yield from _pair(name, ours, theirs, lambda tensor: tensor)
    for name in TABLES:
        yield from _table(name, ours, theirs)
    # The top-k plan is left out: SGLang makes it of the lengths above, its items come in any order, and
    # for few rows it is not written at all.
    if getattr(theirs, "flashmla_metadata", None) is not None:
        mine, other = ours.flashmla_metadata, theirs.flashmla_metadata
        yield from _pair("flashmla_metadata", mine, other, lambda tensor: tensor[:, :FLASHMLA_NUMBERS])
        yield from _pair("num_splits", mine, other, lambda tensor: tensor)


def _pair(
    name: str, ours: Any, theirs: Any, part: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Pair]:
    """What both have; a release may lack a field, and a configuration leave it None."""
    mine, other = getattr(ours, name, None), getattr(theirs, name, None)
    if mine is not None and other is not None:
        yield Pair(name, part(mine), part(other))


def _table(name: str, ours: Any, theirs: Any) -> Iterator[Pair]:
    """Cells up to a row's length. Ours may be wider, by less than a vector."""
    mine, other = getattr(ours, name), getattr(theirs, name)
    if mine is None or (name == "real_page_table" and ours.page_size == 1):
        return
    page_size = 1 if name == "page_table_1" else ours.page_size
    yield Pair(name, mine[:, : other.shape[1]], other, page_size)


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """An event behind everything that the current stream has to do so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
