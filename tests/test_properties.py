"""Random fills, with numbers around every edge, against ``cases.expect``."""

from __future__ import annotations

import torch
from cases import INT32_MAX, INT32_MIN, Backend, Case, Layout
from hypothesis import given, settings
from hypothesis import strategies as st

# How many fills are tried, for each 100 that the hypothesis profile asks for. Triton takes 0.3 s to
# interpret one, and compiles anew for each set of dtypes and of tensors that are there.
PER_HUNDRED = {"cpu:cpu": 1000, "cpu:torch": 400, "cpu:triton": 60, "cuda:triton": 40}
OTHERWISE = 600


def layouts(tables: bool = False) -> st.SearchStrategy[Layout]:
    return st.builds(
        Layout,
        offset=st.integers(0, 3),
        step=st.sampled_from([1, 1, 1, 2, 3]),
        gap=st.integers(0, 5),
        transposed=st.booleans() if tables else st.just(False),
    )


def near(*edges: int) -> st.SearchStrategy[int]:
    """An int32 at most one off an edge."""
    numbers = {edge + off for edge in edges for off in (-1, 0, 1)}
    return st.sampled_from(sorted(number for number in numbers if number <= INT32_MAX))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bs = draw(st.integers(0, 6))
    index_topk = draw(st.sampled_from([1, 2, 7, 64, 2048, INT32_MAX]))
    page_size = draw(st.sampled_from([1, 2, 3, 16, 64]))
    pool = draw(st.integers(0, 4))
    columns = st.sampled_from([0, 1, 2, 4, 63, 64, 65, 130, 600, 1026])
    tokens, width = draw(columns), draw(st.none() | columns)
    pages = draw(st.none() | st.integers(0, 20)) if page_size > 1 else None

    static = draw(st.booleans())
    widths = st.sampled_from([0, 1, 2, 4, 6])
    q = draw(widths)
    dtypes = draw(
        st.fixed_dictionaries(
            {
                name: st.sampled_from([torch.int32, torch.int64])
                for name in ("seq_lens", "extend_lens", "req_pool_indices", "req_to_token")
            }
        )
    )
    odd_widths = widths | widths | ends_of(dtypes["extend_lens"])
    extend_lens = [draw(odd_widths) for _ in range(bs)]
    needed = sum(max(q, 0) for q in extend_lens)
    rows = draw(st.integers(0, min(needed + 3, 24)))

    edges = near(0, q, 64, index_topk, tokens, width or 0, (pages or 0) * page_size)
    lengths = edges | ends_of(dtypes["seq_lens"])
    indices = st.integers(-1, pool) | ends_of(dtypes["req_pool_indices"])
    names = st.sampled_from(
        [
            *("seq_lens", "extend_lens", "req_pool_indices", "enabled", "cache_seqlens"),
            *("cu_seqlens_k", "seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k"),
            *("ctx_lens", "page_table_1", "real_page_table", "row_count"),
        ]
    )
    return Case(
        seq_lens=[draw(lengths) for _ in range(bs)],
        extend_lens=q if static else extend_lens,
        indices=[draw(indices) for _ in range(bs)],
        pool=pool,
        tokens=tokens,
        index_topk=index_topk,
        page_size=page_size,
        width=width,
        pages=pages,
        rows=rows,
        ctx_dims=draw(st.integers(0, 2)),
        row_count=draw(st.booleans()),
        enabled=draw(st.sampled_from([None, None, None, 1, 0])),
        dtypes=dtypes,
        layouts={
            **draw(st.dictionaries(names, layouts(), max_size=6)),
            "req_to_token": draw(layouts(tables=True)),
        },
    )


def ends_of(dtype: torch.dtype) -> st.SearchStrategy[int]:
    """Well formed and wrong: negative, or far too long."""
    ends = [-1, -65, INT32_MIN, INT32_MAX]
    if dtype == torch.int64:
        ends += [2**31, 2**32 + 5, -(2**63), 2**63 - 1]
    return st.sampled_from(ends)


def test_any_fill(fill_backend: Backend, tile: int) -> None:
    per_hundred = PER_HUNDRED.get(str(fill_backend), OTHERWISE)

    @settings(max_examples=settings().max_examples * per_hundred // 100)
    @given(cases())
    def fills_as_expected(case: Case) -> None:
        fill_backend.check(case)

    fills_as_expected()
