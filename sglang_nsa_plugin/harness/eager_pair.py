"""Steps of a backend that the eager adapter took over, beside SGLang's own planning of the same batch.

Every field of the two metadata objects is compared: tensors by shape, dtype and live values, the rest as
it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import eager
from sglang_nsa_plugin.adapters.eager_names import CTX_LENS, Names
from sglang_nsa_plugin.harness.eager_backend import EagerBackend
from sglang_nsa_plugin.harness.graph_pair import Comparison
from sglang_nsa_plugin.harness.pair import BackendPair
from sglang_nsa_plugin.self_test import POISON
from sglang_nsa_plugin.state import STATE

# Under which a comparison counts what is no value of a tensor.
SHAPES = "shapes and dtypes"
PLAIN = "fields without tensors"


class EagerPair(BackendPair[EagerBackend]):
    """:class:`BackendPair` whose eager steps have any size; ragged replays one of the batch sizes."""

    make_rig = EagerBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.ours.backend, eager.ATTRIBUTE):
            raise RuntimeError(f"the plugin did not take over SGLang's backend: {STATE.reason}")

    def _hand_back(self, backend: Any) -> None:
        for attribute in (eager.ATTRIBUTE, eager.RAGGED_ATTRIBUTE):
            vars(backend).pop(attribute, None)

    def bucket(self, raw_bs: int) -> int:
        """An eager step has as many requests as there are."""
        return raw_bs

    def step(self, bs: int, result: Comparison, global_num_tokens: list[int] | None = None) -> None:
        """Both plan the batch in ``inputs``, ours behind poisoned tensors; every field is compared.

        Lengths are raised to the rows of the step, which a server's count: for shorter ones SGLang's
        own are negative, and its schedule is made from those.
        """
        self.inputs.seq_lens.clamp_(min=self.ours.draft_tokens)
        self.plan_both(self.ours.batch(bs, global_num_tokens), result)

    def plan_both(self, batch: Any, result: Comparison) -> None:
        """The same for this batch, as it is."""
        self._poison()
        self.ours.plan(batch)
        self.theirs.sglang_plan(batch)
        ours, theirs = self.ours.backend.forward_metadata, self.theirs.backend.forward_metadata
        compare(ours, theirs, self.ours.names, result)

    def before_replay(self, bs: int) -> Callable[[], None]:
        """The worker's call for one batch of our backend. Call it inside :meth:`stub_process`."""
        batch = self.ours.batch(bs)
        return lambda: self.ours.backend.init_forward_metadata(batch)

    def sglang_before_replay(self, bs: int) -> Callable[[], None]:
        """The same call of the untouched backend, which passes the hook by."""
        batch = self.theirs.batch(bs)
        return lambda: self.theirs.backend.init_forward_metadata(batch)

    def capture_setup(self, bs: int) -> None:
        """Makes the metadata objects of a ragged graph."""
        self.ours.capture_setup(bs)
        self.theirs.capture_setup(bs)

    def ragged_step(self, bs: int, accepted: torch.Tensor, result: Comparison) -> None:
        """Both fill the tensors of a ragged graph; the rows of accepted tokens are compared."""
        names = self.ours.names
        ours = self.ours.backend.decode_cuda_graph_metadata[bs]
        for name in (names.seqlens_expanded, names.cache_seqlens, names.cu_seqlens_k):
            getattr(ours, name).fill_(POISON)
        self.ours.replay(bs, accepted)
        self.theirs.sglang_replay(bs, accepted)
        theirs = self.theirs.backend.decode_cuda_graph_metadata[bs]
        compare(ours, theirs, names, result, extend_lens=accepted[:bs])

    def _poison(self) -> None:
        """The lengths of the step before, which the next one of this shape has to write over."""
        before = getattr(self.ours.backend, "forward_metadata", None)
        if before is None:
            return
        names = self.ours.names
        for name in (names.seqlens_expanded, names.cache_seqlens, names.cu_seqlens_k):
            getattr(before, name).fill_(POISON)
        before.cache_seqlens_int32.fill_(POISON)
        before.cu_seqlens_k.fill_(POISON)


def compare(
    ours: Any, theirs: Any, names: Any, result: Comparison, extend_lens: torch.Tensor | None = None
) -> None:
    """Compares two metadata objects field by field.

    SGLang does not clamp at 0 the lengths of rows before a request's first token, and of a ragged
    batch (``extend_lens``) it leaves rows behind the last one as they were: the former count as 0 here,
    the latter are not compared.
    """
    rows = getattr(theirs, names.seqlens_expanded).shape[0]
    in_use = rows if extend_lens is None else int(extend_lens.sum())
    length = _length_of_rows(theirs, rows, extend_lens)
    lengths = _clamped_lengths(theirs, names)
    for field in dataclasses.fields(theirs):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in ("page_table_1", "real_page_table"):
            page = ours.page_size if field.name == "real_page_table" else 1
            _add_table(result, field.name, mine, other, length[:in_use], page)
        elif field.name in lengths:
            other = lengths[field.name]
            _add_rows(result, field.name, mine, other, in_use + other.shape[0] - rows)
        elif field.name == "paged_mqa_schedule_metadata" and extend_lens is not None:
            continue  # ours is over all rows
        elif field.name == "flashmla_metadata":
            if extend_lens is None:
                _add_flashmla(result, mine, other)
        elif isinstance(other, torch.Tensor):
            _add_rows(result, field.name, mine, other, other.shape[0])
        else:
            _add_value(result, PLAIN, field.name, mine, other)


def _clamped_lengths(metadata: Any, names: Names) -> dict[str, torch.Tensor]:
    """SGLang's lengths of rows with nothing below 0, and their running sums, by field."""
    clamped = {
        name: getattr(metadata, name).clamp(min=0)
        for name in (names.seqlens_expanded, names.cache_seqlens, CTX_LENS)
        if getattr(metadata, name, None) is not None
    }
    sums = clamped[names.cache_seqlens].cumsum(0, dtype=torch.int32)
    return {**clamped, names.cu_seqlens_k: torch.nn.functional.pad(sums, (1, 0))}


def _length_of_rows(metadata: Any, rows: int, extend_lens: torch.Tensor | None) -> torch.Tensor:
    lengths: torch.Tensor = metadata.cache_seqlens_int32
    if extend_lens is None:
        return lengths.repeat_interleave(rows // lengths.shape[0])
    return lengths.repeat_interleave(extend_lens)


def _add_rows(result: Comparison, name: str, ours: Any, theirs: torch.Tensor, rows: int) -> None:
    """The first rows, and that both tensors look the same."""
    _add_value(result, SHAPES, name, (ours.dtype, ours.shape), (theirs.dtype, theirs.shape))
    if ours.shape == theirs.shape:
        live = torch.arange(theirs.shape[0], device=theirs.device) < rows
        result.add(name, ours, theirs, live.view(-1, *[1] * (theirs.dim() - 1)).expand(theirs.shape))


def _add_table(
    result: Comparison, name: str, ours: Any, theirs: torch.Tensor, length: torch.Tensor, page: int
) -> None:
    """Live cells. Ours may be wider by less than a vector; cells past a length hold what they held."""
    rows, width = length.shape[0], theirs.shape[1]
    same = ours.dtype, ours.shape[0], ours.is_contiguous(), 0 <= ours.shape[1] - width < 4
    _add_value(result, SHAPES, name, same, (theirs.dtype, theirs.shape[0], True, True))
    column = torch.arange(0, width * page, page, device=theirs.device)
    result.add(name, ours[:rows, :width], theirs[:rows], column < length[:, None])


def _add_flashmla(result: Comparison, ours: Any, theirs: Any) -> None:
    if theirs is None:
        _add_value(result, PLAIN, "flashmla_metadata", ours, theirs)
        return
    # the last of a part's eight numbers is padding, which FlashMLA leaves as it was
    mine, other = ours.flashmla_metadata[:, :7], theirs.flashmla_metadata[:, :7]
    result.add("flashmla_metadata", mine, other, torch.ones_like(other, dtype=torch.bool))
    _add_rows(result, "flashmla num_splits", ours.num_splits, theirs.num_splits, len(theirs.num_splits))


def _add_value(result: Comparison, kind: str, name: str, ours: Any, theirs: Any) -> None:
    result.compared[kind] += 1
    result.different[kind] += int(ours != theirs)
    if ours != theirs and result.first is None:
        result.first = f"{name}: SGLang {theirs}, ours {ours}"
