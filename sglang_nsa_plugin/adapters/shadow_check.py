"""The shadow check: after every Nth step SGLang fills scratch tensors, and a kernel compares both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sglang_nsa_plugin import shadow
from sglang_nsa_plugin.adapters import fields
from sglang_nsa_plugin.adapters.outcome import Outcome
from sglang_nsa_plugin.containment import attempt
from sglang_nsa_plugin.log import loses
from sglang_nsa_plugin.shadow import Comparison, Field, Pair, Report

# Each part of FlashMLA's plan has eight numbers; the last is padding, which nobody writes.
FLASHMLA_NUMBERS = 7


class ShadowCheck:
    """Counts steps, compares every Nth one, and reports what the comparisons found.

    Nothing waits for the device, so the result of a comparison is known some steps later. After a
    difference :meth:`failed` is true, and SGLang has to fill. An error of the check itself stops it.

    Raises:
        RuntimeError: the library that compares does not run on this device.
    """

    def __init__(self, every: int, device: torch.device, outcome: Outcome) -> None:
        why_not = shadow.why_unavailable(device)
        if why_not is not None:
            raise RuntimeError(f"the shadow check cannot run: {why_not}")
        self.report = Report(device)
        self._outcome, self._state = outcome, outcome.state
        self._every = every
        self._steps = 0
        self._is_running = True
        self._latest: Comparison | None = None
        self._values = 0

    def is_due(self) -> bool:
        """Whether the step that is being planned is to be checked."""
        self._steps += 1
        return self._is_running and self._steps % self._every == 0

    def run(self, comparison: Comparison) -> None:
        """Compares on the current stream."""
        comparison.run()
        self._latest = comparison
        self._state.checks += 1

    def failed(self) -> bool:
        """Whether SGLang has to fill; takes in a result that has arrived."""
        if self._is_running and not self._outcome.has_failed:
            attempt(self._take_in, self.stop)
        return self._outcome.has_failed

    def stop(self, error: Exception) -> None:
        """A check failed: no step is checked any more. The fill goes on."""
        self._is_running = False
        loses("the shadow check")(error)

    def _take_in(self) -> None:
        if self._latest is not None and self.report.arrived():
            values = self.report.values[Field.VALUES]
            self._state.values_checked += values - self._values
            self._values = values
            difference = self._latest.difference()
            if difference is not None:
                self._outcome.fail(difference)


class Scratch:
    """Scratch tensors for SGLang's own fill, shaped like the metadata of the captured batch sizes.

    The batch sizes share the memory of the page tables: on the stream, one check ends before the next
    one fills them.
    """

    def __init__(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}

    def like(self, metadata: Any) -> Any:
        """A metadata object with new tensors of the same shapes; one object stays one object."""
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
            parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            tensors = {name: each for name, each in parts.items() if isinstance(each, torch.Tensor)}
            return dataclasses.replace(value, **{name: each.clone() for name, each in tensors.items()})
        if name not in fields.TABLES:
            return value.clone()
        room = self._tables.get(name)
        if room is None or room.numel() < value.numel():
            room = self._tables[name] = torch.zeros(
                value.numel(), dtype=value.dtype, device=value.device
            )
        return room[: value.numel()].view(value.shape)


class ShadowedReplays:
    """Compares every Nth replay of one backend with SGLang's own fill.

    The graph fills the metadata, and SGLang fills scratch tensors from the same inputs. Where the plugin
    has a hook behind the replay, SGLang's fill and the comparison come there, by :meth:`plan` and
    :meth:`run`: the inputs do not change before the next step, ``req_to_token`` not before the event of
    :meth:`run`. Elsewhere SGLang's fill comes before the replay, by :meth:`fill_ahead`, and the
    comparison before the next one, by :meth:`compare_last`: until then neither set of tensors changes.
    """

    def __init__(self, backend: Any, every: int, outcome: Outcome) -> None:
        self.backend = backend
        self.check = ShadowCheck(every, backend.req_to_token.device, outcome)
        self._scratch = Scratch()
        self._copies: dict[int, tuple[Any, Comparison]] = {}
        self._keys: dict[int, Any] = {}  # of SGLang's table, by batch size
        self._planned: tuple[Any, Callable[[Any, Any], object]] | None = None
        self._ahead: Comparison | None = None

    def forget(self) -> None:
        """Drops the scratch tensors: SGLang allocates new metadata."""
        self._copies.clear()
        self._planned = None
        self.drop()

    def drop(self) -> None:
        """Leaves out the comparison of the last replay."""
        self._ahead = None

    def prepare(self, bs: int, metadata: Any) -> None:
        """Allocates the scratch tensors of one batch size, so that nothing is allocated in service."""
        table = self.backend.decode_cuda_graph_metadata
        (self._keys[bs],) = (key for key, captured in table.items() if captured is metadata)
        copy = self._scratch.like(metadata)
        self._copies[bs] = copy, compare(metadata, copy, fields.DSA, self.check)

    def plan(self, batch: Any, sglang_fill: Callable[[Any, Any], object]) -> None:
        """Before a replay: notes whether it is to be checked."""
        self._planned = (batch, sglang_fill) if self.check.is_due() else None

    def run(self) -> torch.cuda.Event | None:
        """After the replay: where a check is planned, SGLang's fill and the comparison.

        Returns the event after which SGLang's fill has read ``req_to_token``; None where none ran.
        """
        if self._planned is None:
            return None
        (batch, sglang_fill), self._planned = self._planned, None
        comparison = self._fill_scratch(batch, sglang_fill)
        read_done = _event_now(self.backend.req_to_token.device)
        self.check.run(comparison)
        return read_done

    def fill_ahead(self, batch: Any, sglang_fill: Callable[[Any, Any], object]) -> None:
        """Before a replay: where it is to be checked, SGLang's fill into the scratch tensors."""
        if self.check.is_due():
            self._ahead = self._fill_scratch(batch, sglang_fill)

    def compare_last(self) -> None:
        """Before the next replay: compares the last one with what SGLang filled ahead of it."""
        if self._ahead is not None:
            comparison, self._ahead = self._ahead, None
            self.check.run(comparison)

    def _fill_scratch(self, batch: Any, sglang_fill: Callable[[Any, Any], object]) -> Comparison:
        backend, bs = self.backend, batch.batch_size
        copy, comparison = self._copies[bs]
        table, key = backend.decode_cuda_graph_metadata, self._keys[bs]
        metadata, table[key] = table[key], copy
        try:
            sglang_fill(backend, batch)
        finally:
            table[key] = metadata
            backend.forward_metadata = metadata
        return comparison


def compare(ours: Any, theirs: Any, names: Mapping[str, str], check: ShadowCheck) -> Comparison:
    """Binds the comparison of two metadata objects with the same number of rows for each request.

    ``names`` are SGLang's names of the fields, see :mod:`fields`.
    """
    lengths = getattr(theirs, names["cache_seqlens"])
    return Comparison(list(pairs(ours, theirs, names)), lengths, check.report)


def pairs(ours: Any, theirs: Any, names: Mapping[str, str]) -> Iterator[Pair]:
    """The tensors of two metadata objects that are to be equal, under SGLang's names.

    Top-k plans are left out: SGLang makes them from the lengths, their items come in any order, and that
    of few rows is not written at all.
    """
    for name in (*fields.LENGTHS, "ctx_lens", "mqa_schedule"):
        yield from _pair(names[name], ours, theirs)
    for table in fields.TABLES:
        yield from _table(table, ours, theirs)
    if getattr(theirs, fields.KPOOL_PLAN, None) is not None:
        yield from _kpool_pairs(ours, theirs)
    if getattr(theirs, fields.FLASHMLA, None) is not None:
        yield from flashmla_pairs(ours.flashmla_metadata, theirs.flashmla_metadata)


def flashmla_pairs(ours: Any, theirs: Any) -> Iterator[Pair]:
    """The parts of two FlashMLA plans that are written."""
    numbers = [each.flashmla_metadata[:, :FLASHMLA_NUMBERS] for each in (ours, theirs)]
    yield Pair(fields.FLASHMLA, *numbers)
    yield Pair("flashmla num_splits", ours.num_splits, theirs.num_splits)


def _kpool_pairs(ours: Any, theirs: Any) -> Iterator[Pair]:
    """What a model with a pooled index has besides."""
    for name, paths in fields.KPOOL.items():
        for path in paths:
            mine, other = fields.at(ours, path), fields.at(theirs, path)
            if mine is None or other is None:
                continue
            tokens = theirs.pooled_index_kpool * theirs.page_size
            page_size = tokens if name == "kpool_page_table" else None
            yield Pair(path, _as_int32(mine), _as_int32(other), page_size)


def _as_int32(tensor: torch.Tensor) -> torch.Tensor:
    """An int64 tensor as twice as many columns, the low and the high half of each number."""
    return tensor.view(torch.int32) if tensor.dtype == torch.int64 else tensor


def _pair(name: str, ours: Any, theirs: Any) -> Iterator[Pair]:
    """What both have: a release may lack a field, and a configuration leave it None."""
    mine, other = getattr(ours, name, None), getattr(theirs, name, None)
    if mine is not None and other is not None:
        yield Pair(name, mine, other)


def _table(name: str, ours: Any, theirs: Any) -> Iterator[Pair]:
    """Cells up to a row's length. Our table may be wider, by less than a vector."""
    mine, other = getattr(ours, name), getattr(theirs, name)
    if mine is None or (name == "real_page_table" and ours.page_size == 1):
        return
    page_size = fields.tokens_per_column(name, ours.page_size)
    yield Pair(name, mine[:, : other.shape[1]], other, page_size)


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """An event after everything that is on the current stream so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
