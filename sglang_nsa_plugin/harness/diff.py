"""The one comparison of demo, bench and the tests: which cells are live, and which of them differ.

By torch, on the device of the tensors: slower than the shadow check's kernel, and independent of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from sglang_nsa_plugin.adapters import fields, shadow_check
from sglang_nsa_plugin.adapters.eager_names import SglangNames

# Under which a Diff counts what is not a value of a tensor.
SHAPES = "shapes and dtypes"
PLAIN = "fields without tensors"
# A diff of captured metadata counts lengths under our names.
_OUR_NAMES = {fields.DSA[name]: name for name in (*fields.LENGTHS, "ctx_lens")}


class Diff:
    """Counts of values that were compared and that differed, by tensor, and the first difference."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.first: str | None = None

    def add(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compares every cell of two tensors of one shape."""
        self._add(name, ours, theirs, torch.ones_like(theirs, dtype=torch.bool))

    def add_table(
        self,
        name: str,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        lengths: torch.Tensor,
        tokens_per_column: int,
    ) -> None:
        """Compares the live cells of two page tables, whose rows have these lengths in tokens.

        A cell is live when the first token of its column lies below the length of its row. The others
        hold whatever they held. One table may be wider than the other.
        """
        rows = lengths.shape[0]
        longest = max(int(lengths.max()), 0) if rows else 0
        columns = min(-(-longest // tokens_per_column), ours.shape[1], theirs.shape[1])
        first_token = torch.arange(columns, device=theirs.device) * tokens_per_column
        live = first_token < lengths[:, None]
        self._add(name, ours[:rows, :columns], theirs[:rows, :columns], live)

    def add_value(self, kind: str, name: str, ours: Any, theirs: Any) -> None:
        """Compares what is not a tensor."""
        self.compared[kind] += 1
        self.different[kind] += int(ours != theirs)
        if ours != theirs and self.first is None:
            self.first = f"{name}: SGLang {theirs}, ours {ours}"

    def _add(self, name: str, ours: torch.Tensor, theirs: torch.Tensor, live: torch.Tensor) -> None:
        wrong = (ours != theirs) & live
        self.compared[name] += int(live.sum())
        count = int(wrong.sum())
        self.different[name] += count
        if count and self.first is None:
            where = tuple(wrong.nonzero()[0].tolist())
            self.first = f"{name}{list(where)}: SGLang {int(theirs[where])}, ours {int(ours[where])}"


def compare_captured(ours: Any, theirs: Any, diff: Diff) -> None:
    """Compares the metadata objects of a batch size whose plan is captured in a graph."""
    expanded, lengths = theirs.dsa_seqlens_expanded, theirs.cache_seqlens_int32
    of_rows = lengths.repeat_interleave(expanded.shape[0] // lengths.shape[0])
    for pair in shadow_check.pairs(ours, theirs, fields.DSA):
        name = _OUR_NAMES.get(pair.name, pair.name)
        if pair.page_size is None:
            diff.add(name, pair.ours, pair.theirs)
        else:
            diff.add_table(name, pair.ours, pair.theirs, of_rows, pair.page_size)
    _compare_kpool_plans(ours, theirs, diff)
    has_plan = getattr(ours, fields.TOPK_PLAN, None) is not None  # since 0.5.15
    if has_plan and plan_is_written(expanded):
        diff.add(fields.TOPK_PLAN, _plan(ours.topk_v2_plan), _plan(theirs.topk_v2_plan))


def _compare_kpool_plans(ours: Any, theirs: Any, diff: Diff) -> None:
    """The top-k plans of a pooled index, since 0.5.23."""
    for path in fields.KPOOL_TOPK_PLAN:
        mine, other = fields.at(ours, path), fields.at(theirs, path)
        if mine is not None and plan_is_written(fields.read_kpool(theirs)["kpool_seqlens"]):
            diff.add(path, _plan(mine), _plan(other))


def plan_is_written(lengths: torch.Tensor) -> bool:
    """Since 0.5.21 SGLang does not write plans that nobody reads: those of few rows."""
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


def compare_planned(
    ours: Any,
    theirs: Any,
    names: SglangNames,
    diff: Diff,
    rows_per_request: torch.Tensor | None = None,
) -> None:
    """Compares two metadata objects that an eager step planned, field by field.

    ``rows_per_request`` are those of a ragged batch, of which SGLang leaves the rows after the last one
    as they were: those are not compared. SGLang does not clamp at 0 the lengths of rows before a
    request's first token: they count as 0 here.
    """
    rows = getattr(theirs, names.outputs["seqlens_expanded"]).shape[0]
    in_use = rows if rows_per_request is None else int(rows_per_request.sum())
    of_rows = _lengths_of_rows(theirs, rows, rows_per_request)
    clamped = _clamped_lengths(theirs, names)
    for field in dataclasses.fields(theirs):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in fields.TABLES:
            tokens = fields.tokens_per_column(field.name, ours.page_size)
            _add_page_table(diff, field.name, mine, other, of_rows[:in_use], tokens)
        elif field.name in clamped:
            other = clamped[field.name]
            _add_rows(diff, field.name, mine, other, in_use + other.shape[0] - rows)
        elif field.name == names.outputs["mqa_schedule"] and rows_per_request is not None:
            continue  # ours is over all rows
        elif field.name == fields.FLASHMLA:
            if rows_per_request is None:
                _add_flashmla(diff, mine, other)
        elif isinstance(other, torch.Tensor):
            _add_rows(diff, field.name, mine, other, other.shape[0])
        else:
            diff.add_value(PLAIN, field.name, mine, other)


def _lengths_of_rows(metadata: Any, rows: int, rows_per_request: torch.Tensor | None) -> torch.Tensor:
    lengths: torch.Tensor = metadata.cache_seqlens_int32
    if rows_per_request is None:
        return lengths.repeat_interleave(rows // lengths.shape[0])
    return lengths.repeat_interleave(rows_per_request)


def _clamped_lengths(metadata: Any, names: SglangNames) -> dict[str, torch.Tensor]:
    """SGLang's lengths of rows with nothing below 0, and their running sums, by field."""
    by_row = fields.read(metadata, names.outputs, ("seqlens_expanded", "nsa_cache_seqlens", "ctx_lens"))
    clamped = {
        names.outputs[name]: tensor.clamp(min=0) for name, tensor in by_row.items() if tensor is not None
    }
    sums = clamped[names.outputs["nsa_cache_seqlens"]].cumsum(0, dtype=torch.int32)
    return {**clamped, names.outputs["nsa_cu_seqlens_k"]: torch.nn.functional.pad(sums, (1, 0))}


def _add_rows(diff: Diff, name: str, ours: Any, theirs: torch.Tensor, rows: int) -> None:
    """The first rows, and that both tensors have one shape and dtype."""
    diff.add_value(SHAPES, name, (ours.dtype, ours.shape), (theirs.dtype, theirs.shape))
    if ours.shape == theirs.shape:
        diff.add(name, ours[:rows], theirs[:rows])


def _add_page_table(
    diff: Diff, name: str, ours: Any, theirs: torch.Tensor, of_rows: torch.Tensor, tokens: int
) -> None:
    """The live cells, and that ours looks like SGLang's: it may be wider by less than a vector."""
    look = ours.dtype, ours.shape[0], ours.is_contiguous(), 0 <= ours.shape[1] - theirs.shape[1] < 4
    diff.add_value(SHAPES, name, look, (theirs.dtype, theirs.shape[0], True, True))
    diff.add_table(name, ours, theirs, of_rows, tokens)


def _add_flashmla(diff: Diff, ours: Any, theirs: Any) -> None:
    if theirs is None:
        diff.add_value(PLAIN, fields.FLASHMLA, ours, theirs)
        return
    for pair in shadow_check.flashmla_pairs(ours, theirs):
        _add_rows(diff, pair.name, pair.ours, pair.theirs, len(pair.theirs))
