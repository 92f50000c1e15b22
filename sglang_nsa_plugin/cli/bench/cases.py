"""The cases of ``bench``: their grids, their tensors, and the bytes that a fill of one must move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.harness.inputs import Inputs, random_step

PAGE = 64
INDEX_TOPK = 2_048
BOTH, PAGED = "both", "paged"
SECTOR = 32  # bytes: the smallest amount that a GPU reads from its memory


@dataclass(frozen=True)
class Case:
    """One batch: requests of equal length, each with its own row of the pool."""

    requests: int
    length: int


@dataclass(frozen=True)
class Setup:
    """Cases that share their tensors: the same width of req_to_token, the same draft tokens."""

    width: int = 163_904
    draft_tokens: int = 4
    requests: tuple[int, ...] = (1, 8, 32, 64, 128, 256, 512)
    lengths: tuple[int, ...] = (2_048, 32_768, 131_072)
    decode_impl: str = "flashmla_sparse"

    def cases(self) -> list[Case]:
        """The cases of this set-up in the order of measurement."""
        return [Case(bs, length) for bs in self.requests for length in self.lengths]


@dataclass(frozen=True)
class Grid:
    """The set-ups of one run, and how long one case may be timed."""

    setups: tuple[Setup, ...]
    seconds: float = 0.5


_MAIN = Setup()
_FEW = (1, 8, 64, 512)
FULL = Grid(
    (
        _MAIN,
        replace(_MAIN, decode_impl="flashmla_kv", requests=(8, 64), lengths=(32_768,)),
        replace(_MAIN, width=4_096, requests=_FEW, lengths=(2_048,)),
        replace(_MAIN, width=1_048_640, requests=_FEW, lengths=(2_048,)),
        replace(_MAIN, draft_tokens=2, requests=_FEW, lengths=(2_048, 131_072)),
        replace(_MAIN, draft_tokens=8, requests=_FEW, lengths=(2_048, 131_072)),
    )
)
QUICK = Grid((replace(_MAIN, requests=_FEW, lengths=(2_048, 32_768)),), seconds=0.2)
ROLES = Grid((replace(_MAIN, requests=(1, 8, 64, 512), lengths=(32_768,)),), seconds=1.0)
# Before 0.5.15 the host does the work, which grows with the batch: a few sizes are enough.
EAGER = Grid(
    tuple(
        replace(_MAIN, requests=(1, 8, 32, 64), decode_impl=impl)
        for impl in ("flashmla_sparse", "flashmla_kv")
    )
)
ON_CPU = Grid((replace(_MAIN, width=4_096, requests=(1, 8, 32), lengths=(2_048,)),), seconds=0.3)


def write_slots(inputs: Inputs) -> None:
    """Random slots, in whole pages, in every row of req_to_token but the first."""
    rng = torch.Generator(inputs.seq_lens.device).manual_seed(0)
    random_step(inputs, rng, 0, 0, 1, inputs.req_to_token.shape[1])


def write_lengths(inputs: Inputs, case: Case) -> None:
    """Writes the batch of the case over the slots that :func:`write_slots` wrote."""
    inputs.seq_lens[: case.requests].fill_(case.length)
    inputs.req_pool_indices[: case.requests].copy_(torch.arange(1, case.requests + 1))


class DirectFills:
    """Outputs for fills without SGLang, allocated once for the largest batch and sliced."""

    def __init__(self, inputs: Inputs, max_bs: int, draft_tokens: int) -> None:
        width = inputs.req_to_token.shape[1]
        rows = max_bs * draft_tokens
        self.inputs = inputs
        self.draft_tokens = draft_tokens
        self.enabled = self._numbers(1).fill_(1)
        self.lengths = {
            "cache_seqlens": self._numbers(max_bs),
            "cu_seqlens_k": self._numbers(max_bs + 1),
            "seqlens_expanded": self._numbers(rows),
            "nsa_cache_seqlens": self._numbers(rows),
            "nsa_cu_seqlens_k": self._numbers(rows + 1),
        }
        self.page_table_1 = self._numbers(rows, width)
        self.real_page_table = self._numbers(rows, -(-width // PAGE))

    def args(self, bs: int, tables: str) -> FillArgs:
        """The arguments of a fill of the first ``bs`` requests, with both page tables or only one."""
        rows = bs * self.draft_tokens
        sizes = (bs, bs + 1, rows, rows, rows + 1)
        lengths: dict[str, Any] = {
            name: tensor[:size] for (name, tensor), size in zip(self.lengths.items(), sizes, strict=True)
        }
        return FillArgs(
            seq_lens=self.inputs.seq_lens[:bs],
            req_pool_indices=self.inputs.req_pool_indices[:bs],
            req_to_token=self.inputs.req_to_token,
            extend_lens=self.draft_tokens,
            index_topk=INDEX_TOPK,
            page_size=PAGE,
            **lengths,
            page_table_1=self.page_table_1[:rows] if tables == BOTH else None,
            real_page_table=self.real_page_table[:rows],
            enabled=self.enabled,
        )

    def _numbers(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.inputs.seq_lens.device)


def bytes_to_move(case: Case, draft_tokens: int, tables: str) -> dict[str, int]:
    """Bytes that any fill of this case must read and write.

    Read, in sectors of 32 bytes: with both tables the L slots of each request's row of req_to_token,
    which include those of the page-64 table; with that table only, one sector for each page of 64 slots.
    A row counts once, however many output rows it is copied to. Each request also has an int64 length
    and an int64 row index.

    Written: 4 bytes for each live cell of each output.
    """
    bs, length = case.requests, case.length
    rows = bs * draft_tokens
    pages = -(-length // PAGE)
    slots = -(-4 * length // SECTOR) * SECTOR if tables == BOTH else pages * SECTOR
    row_cells = pages + (length if tables == BOTH else 0)
    lengths = bs + (bs + 1) + rows + rows + (rows + 1)
    return {"read": bs * (slots + 8 + 8), "written": 4 * (rows * row_cells + lengths)}
