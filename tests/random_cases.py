"""Random batches whose sizes, lengths and layouts lie at edges more often than not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from cases import INT32_MAX, INT32_MIN, Case, Layout

INDEX_INPUTS = ("seq_lens", "extend_lens", "req_pool_indices", "req_to_token")
OUTPUTS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "seqlens_expanded",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "ctx_lens",
    "page_table_1",
    "real_page_table",
    "row_count",
    "mqa_schedule",
)
# One tensor for two inputs: legal, and a kernel may not assume otherwise.
SHARED = (
    {"req_pool_indices": "seq_lens"},
    {"extend_lens": "seq_lens"},
    {"extend_lens": "req_pool_indices"},
)


@dataclass(frozen=True)
class Scale:
    """What an implementation takes at a time; batches end just before, at and after that.

    ``few_kinds`` gives all index inputs one dtype, and leaves out all optional vectors or none: compiled
    Triton takes a second for each kind of fill that it has not seen.
    """

    requests: int = 128
    columns: int = 512
    few_kinds: bool = False


def random_case(rng: Random, scale: Scale) -> Case:
    """Any fill that FillArgs takes. All that is random in it comes from ``rng``."""
    bs = rng.randint(0, 8) if happens(rng, 0.95) else near(rng, scale.requests, 2 * scale.requests)
    q = rng.choice([0, 1, 2, 3, 4, 6, 8])
    index_topk = rng.choice([1, 2, 7, 64, 2048, INT32_MAX])
    page_size = rng.choice([1, 2, 3, 16, 64])
    pool = rng.randint(0, 4)
    tokens = _columns(rng, scale)
    like_tokens = max(near(rng, tokens), 0)
    width = rng.choice([like_tokens, _columns(rng, scale), None])
    pages = rng.randint(0, 20) if page_size > 1 and happens(rng, 0.7) else None
    dtypes = _dtypes(rng, scale)

    offset = rng.choice([0, 0, q, q, 1, rng.randint(0, 200), near(rng, INT32_MAX)])
    edges = (0, 1, q, 64, index_topk, tokens, width or 0, (pages or 0) * page_size, scale.columns)
    lengths = [_length(rng, edges, dtypes["seq_lens"], offset) for _ in range(bs)]
    uniform = happens(rng, 0.5)
    extend_lens = q if uniform else [_extend_len(rng, dtypes["extend_lens"]) for _ in range(bs)]
    shared = rng.choice(SHARED) if happens(rng, 0.1) else {}
    return Case(
        seq_lens=lengths,
        length_offset=offset,
        extend_lens=extend_lens,
        indices=[_index(rng, pool, dtypes["req_pool_indices"]) for _ in range(bs)],
        pool=pool,
        tokens=tokens,
        index_topk=index_topk,
        page_size=page_size,
        width=width,
        pages=pages,
        rows=None if uniform else _rows(rng, extend_lens),
        expanded=extend_lens != 1 or happens(rng, 0.5),
        dtypes=dtypes,
        layouts=_layouts(rng),
        shared=shared,
        processors=rng.choice([None, 1, 2, 78, 132, 300]) if uniform else None,
        remainder_last=happens(rng, 0.5),
        by_request=uniform and q > 1 and happens(rng, 0.3),
        **_optional_vectors(rng, scale),
    )


def happens(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def near(rng: Random, *edges: int) -> int:
    """An int32 at most one off an edge."""
    return min(rng.choice(edges) + rng.choice((0, -1, 1)), INT32_MAX)


def ends(rng: Random, dtype: torch.dtype) -> int:
    """Well formed and wrong: negative, or far too long."""
    numbers = [-1, -65, INT32_MIN, INT32_MAX]
    if dtype == torch.int64:
        numbers += [2**31, 2**32 + 5, -(2**63), 2**63 - 1]
    return rng.choice(numbers)


def _columns(rng: Random, scale: Scale) -> int:
    if happens(rng, 0.2):
        return near(rng, scale.columns, 2 * scale.columns)
    return rng.choice([0, 1, 2, 3, 4, 5, 31, 63, 64, 65, 66, 130])


def _dtypes(rng: Random, scale: Scale) -> dict[str, torch.dtype]:
    both = (torch.int32, torch.int64)
    if scale.few_kinds:
        return dict.fromkeys(INDEX_INPUTS, rng.choice(both))
    return {name: rng.choice(both) for name in INDEX_INPUTS}


def _optional_vectors(rng: Random, scale: Scale) -> dict[str, Any]:
    if scale.few_kinds and happens(rng, 0.5):
        return {}
    if scale.few_kinds:
        return {"ctx_dims": rng.randint(1, 2), "row_count": True, "enabled": int(happens(rng, 0.8))}
    return {
        "ctx_dims": rng.randint(0, 2),
        "row_count": happens(rng, 0.5),
        "enabled": rng.choice([*[None] * 7, 1, 1, 0]),
    }


def _length(rng: Random, edges: Sequence[int], dtype: torch.dtype, offset: int) -> int:
    """A number of seq_lens: it or its sum with the offset is near an edge, more often than not."""
    kind = rng.random()
    if kind < 0.7:
        return near(rng, *edges) - (offset if happens(rng, 0.5) else 0)
    return rng.randint(0, 200) if kind < 0.85 else ends(rng, dtype)


def _extend_len(rng: Random, dtype: torch.dtype) -> int:
    return rng.choice([0, 1, 2, 4, 6]) if happens(rng, 0.85) else ends(rng, dtype)


def _index(rng: Random, pool: int, dtype: torch.dtype) -> int:
    return rng.randint(-1, pool) if happens(rng, 0.9) else ends(rng, dtype)


def _rows(rng: Random, extend_lens: Sequence[int]) -> int:
    """Rows of a ragged batch: as many as it needs, one off, or any number."""
    needed = sum(max(q, 0) for q in extend_lens)
    at_most = 4 * len(extend_lens) + 8
    return min(max(near(rng, needed), 0), at_most) if happens(rng, 0.6) else rng.randint(0, at_most)


def _layouts(rng: Random) -> dict[str, Layout]:
    layouts = {"req_to_token": _source_layout(rng)}
    for name in rng.sample((*INDEX_INPUTS[:3], *OUTPUTS, "enabled"), rng.randint(0, 6)):
        steps = (1, 1, 2, 3) if name in OUTPUTS else (1, 2, 3, 0)
        layouts[name] = Layout(offset=rng.randint(0, 3), step=rng.choice(steps), gap=rng.randint(0, 5))
    return layouts


def _source_layout(rng: Random) -> Layout:
    """An input: its rows may also share memory."""
    return Layout(
        offset=rng.randint(0, 3),
        step=rng.choice((1, 1, 1, 2, 3, 0)),
        gap=rng.randint(-2, 5),
        transposed=happens(rng, 0.3),
    )


def sglang_case(rng: Random) -> Case:
    """A fill that SGLang asks of its own kernel: at least one row, requests inside the pool, tables of
    one width, contiguous outputs."""
    return _sglang_case(rng, lowest=-1)


def verify_case(rng: Random) -> Case:
    """The same of target-verify: the lengths are those before the rows."""
    case = _sglang_case(rng, lowest=0)
    rows = rng.randint(1, 6)
    return replace(case, extend_lens=rows, length_offset=rows)


def decode_case(rng: Random) -> Case:
    """The same of decode: one row for each request, and no expanded lengths."""
    return replace(_sglang_case(rng, lowest=0), extend_lens=1, expanded=False)


def _sglang_case(rng: Random, lowest: int) -> Case:
    bs, pool, page_size = rng.randint(1, 6), rng.randint(1, 4), rng.choice([1, 16, 64])
    width = rng.choice([1, 63, 64, 65, 127, 128, 129, 200, 257])
    q = rng.randint(1, 6)
    others = [rng.randint(0, 6) for _ in range(bs - 1)]
    edges = (0, 1, q, 64, 128, width)
    return Case(
        seq_lens=[min(max(near(rng, *edges), lowest), width) for _ in range(bs)],
        extend_lens=q if happens(rng, 0.5) else [q, *others],
        indices=[rng.randrange(pool) for _ in range(bs)],
        pool=pool,
        tokens=width + rng.randint(0, 3),
        index_topk=rng.choice([1, 2, 7, 64, 2048]),
        page_size=page_size,
        width=width if page_size == 1 or happens(rng, 0.7) else None,
        pages=-(-width // page_size) if page_size > 1 else None,
        dtypes={name: rng.choice((torch.int32, torch.int64)) for name in INDEX_INPUTS},
        layouts={name: Layout(gap=rng.randint(0, 3), offset=rng.randint(0, 3)) for name in OUTPUTS[6:8]},
    )
