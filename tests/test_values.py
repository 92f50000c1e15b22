"""What a fill writes, one test for each way in which such metadata has gone wrong before.

Every check compares the whole memory around each tensor with ``cases.expect``. Where the numbers of
a failure are few, they also stand in the test.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    DENSE,
    INT32_MAX,
    INT32_MIN,
    POISON,
    Backend,
    Case,
    Guarded,
    Layout,
    fill_args,
    vast_vector,
)

BOTH_TABLES = {"width": 40, "pages": 6, "page_size": 8}
INDEX_INPUTS = ("seq_lens", "extend_lens", "req_pool_indices", "req_to_token")
ALL_INT32 = dict.fromkeys(INDEX_INPUTS, torch.int32)


def values_of(guarded: Guarded) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in guarded.args.outputs().items()}


# Lengths shorter than the draft (padded rows)


@pytest.mark.parametrize("q", range(1, 9))
def test_rows_of_requests_shorter_than_the_draft_are_zero(fill_backend: Backend, q: int) -> None:
    lengths = range(q + 1)
    out = values_of(fill_backend.check(Case(seq_lens=lengths, extend_lens=q, ctx_dims=2)))
    # for L = 2 of q = 5: 0, 0, 0, 1, 2; never -2, and never 1 where there is nothing
    wanted = [value for L in lengths for value in (*[0] * (q - L), *range(1, L + 1))]
    assert out["seqlens_expanded"] == wanted
    assert out["nsa_cache_seqlens"] == wanted
    assert out["ctx_lens"] == [[value] for value in wanted]


def test_padded_row_of_length_one_in_a_draft_of_six(fill_backend: Backend) -> None:
    out = values_of(fill_backend.check(Case(seq_lens=[1], extend_lens=6)))
    assert out["seqlens_expanded"] == [0, 0, 0, 0, 0, 1]


def test_no_consumer_sees_a_negative_row_length(fill_backend: Backend) -> None:
    lengths = [-1, -2, -100, INT32_MIN, INT32_MIN + 1, 0, 1]
    out = values_of(fill_backend.check(Case(seq_lens=lengths, extend_lens=4, ctx_dims=1)))
    for name in ("seqlens_expanded", "nsa_cache_seqlens", "ctx_lens"):
        assert min(out[name]) == 0, name  # as uint32, -4 is 4294967292
        assert max(out[name]) == 1, name
    assert out["nsa_cu_seqlens_k"] == [0] * 28 + [1]


def test_padded_requests_leave_the_others_alone(fill_backend: Backend) -> None:
    live = Case(seq_lens=[19, 33, 7], indices=[2, 4, 1], extend_lens=3, **BOTH_TABLES)
    padded = replace(live, seq_lens=[19, 33, 7, 1], indices=[2, 4, 1, 0])
    alone, in_bucket = fill_backend.check(live), fill_backend.check(padded)
    for name, tensor in alone.args.outputs().items():
        assert torch.equal(in_bucket.args.outputs()[name][: len(tensor)], tensor), name


# Lengths


def test_cache_seqlens_is_the_length_after_the_draft(fill_backend: Backend) -> None:
    out = values_of(fill_backend.check(Case(seq_lens=[100, 7, 64], extend_lens=6)))
    assert out["cache_seqlens"] == [100, 7, 64]
    assert out["cu_seqlens_k"] == [0, 100, 107, 171]
    assert out["seqlens_expanded"][:6] == [95, 96, 97, 98, 99, 100]


def test_lengths_are_clamped_to_the_top_k_and_summed(fill_backend: Backend) -> None:
    out = values_of(fill_backend.check(Case(seq_lens=[21, 3], extend_lens=4, index_topk=20)))
    assert out["seqlens_expanded"] == [18, 19, 20, 21, 0, 1, 2, 3]
    assert out["nsa_cache_seqlens"] == [18, 19, 20, 20, 0, 1, 2, 3]
    assert out["nsa_cu_seqlens_k"] == [0, 18, 37, 57, 77, 77, 78, 80, 83]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("extend_lens", [3, [3, 0, 2, 3, 1, 4]], ids=["uniform", "ragged"])
def test_extreme_lengths(fill_backend: Backend, dtype: torch.dtype, extend_lens: object) -> None:
    case = Case(
        seq_lens=[INT32_MAX, -1, INT32_MIN, 0, INT32_MAX, INT32_MAX - 1],
        extend_lens=extend_lens,  # type: ignore[arg-type]
        dtypes={"seq_lens": dtype},
        **BOTH_TABLES,
    )
    fill_backend.check(case)


def test_only_the_low_32_bits_of_a_length_count(fill_backend: Backend) -> None:
    huge = [2**32 + 5, 2**31, -(2**63), 2**63 - 1, 2**40 + 2**31 - 1, -(2**33) + 9]
    out = values_of(fill_backend.check(Case(seq_lens=huge, extend_lens=2, **BOTH_TABLES)))
    assert out["cache_seqlens"] == [5, INT32_MIN, 0, -1, INT32_MAX, 9]


def test_an_offset_counts_in_every_length(fill_backend: Backend) -> None:
    """Verify of four draft tokens: the lengths without them, from which the first row follows."""
    case = Case(
        seq_lens=[18, 1], length_offset=4, extend_lens=4, index_topk=20, ctx_dims=2, row_count=True
    )
    out = values_of(fill_backend.check(replace(case, **BOTH_TABLES)))
    assert out["cache_seqlens"] == [22, 5]
    assert out["cu_seqlens_k"] == [0, 22, 27]
    assert out["seqlens_expanded"] == [19, 20, 21, 22, 2, 3, 4, 5]
    assert out["nsa_cache_seqlens"] == [19, 20, 20, 20, 2, 3, 4, 5]
    assert out["nsa_cu_seqlens_k"] == [0, 19, 39, 59, 79, 81, 84, 88, 93]
    assert [row.count(POISON) for row in out["page_table_1"]] == [18] * 4 + [35] * 4
    assert [row.count(POISON) for row in out["real_page_table"]] == [3] * 4 + [5] * 4


@pytest.mark.parametrize("extend_lens", [3, [3, 0, 4, 1, 2]], ids=["uniform", "ragged"])
@pytest.mark.parametrize("offset", [1, 6, 100, INT32_MAX])
def test_an_offset_equals_longer_lengths(
    fill_backend: Backend, offset: int, extend_lens: object
) -> None:
    lengths = [0, 1, 40, 41, 260]
    longer = Case(
        seq_lens=[length - offset for length in lengths],
        length_offset=offset,
        extend_lens=extend_lens,  # type: ignore[arg-type]
        processors=7 if isinstance(extend_lens, int) else None,
        **BOTH_TABLES,
    )
    plain = replace(longer, seq_lens=lengths, length_offset=0)
    one, other = fill_backend.check(longer), fill_backend.check(plain)
    for name, tensor in one.args.outputs().items():
        assert torch.equal(tensor, other.args.outputs()[name]), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_sum_with_the_offset_wraps_like_int32(fill_backend: Backend, dtype: torch.dtype) -> None:
    """No table is read or written past its end, whatever the sum is."""
    lengths = [INT32_MAX, INT32_MAX - 3, INT32_MAX - 4, INT32_MIN, -4, -5, 0]
    case = Case(seq_lens=lengths, length_offset=4, extend_lens=2, dtypes={"seq_lens": dtype})
    out = values_of(fill_backend.check(replace(case, processors=5, **BOTH_TABLES)))
    wanted = [INT32_MIN + 3, INT32_MIN, INT32_MAX, INT32_MIN + 4, 0, -1, 4]
    assert out["cache_seqlens"] == wanted
    assert out["seqlens_expanded"] == [0, 0, 0, 0, INT32_MAX - 1, INT32_MAX, *[0] * 6, 3, 4]
    fill_backend.check(replace(case, extend_lens=[2] * 7, **BOTH_TABLES))


def test_only_the_low_32_bits_of_a_sum_with_the_offset_count(fill_backend: Backend) -> None:
    huge = [2**31 - 1, 2**32 - 4, 2**32 + 5, 2**63 - 1, -(2**63)]
    case = Case(seq_lens=huge, length_offset=4, extend_lens=2, **BOTH_TABLES)
    assert values_of(fill_backend.check(case))["cache_seqlens"] == [INT32_MIN + 3, 0, 9, 3, 4]
    most = replace(case, length_offset=INT32_MAX)
    wanted = [-2, INT32_MAX - 4, INT32_MIN + 4, INT32_MAX - 1, INT32_MAX]
    assert values_of(fill_backend.check(most))["cache_seqlens"] == wanted


def test_expanded_lengths_left_out(fill_backend: Backend) -> None:
    """One row for each request, as in SGLang's decode: the other outputs are as with them."""
    case = Case(seq_lens=[0, 33, -7, 90, INT32_MAX], ctx_dims=2, row_count=True, processors=3)
    decode = replace(case, expanded=False, **BOTH_TABLES)
    without, full = fill_backend.check(decode), fill_backend.check(replace(decode, expanded=True))
    assert full.args.outputs().keys() - without.args.outputs().keys() == {"seqlens_expanded"}
    for name, tensor in without.args.outputs().items():
        assert torch.equal(tensor, full.args.outputs()[name]), name


def test_sums_wrap_like_int32(fill_backend: Backend) -> None:
    case = Case(seq_lens=[INT32_MAX] * 5, extend_lens=3, index_topk=INT32_MAX, row_count=True)
    out = values_of(fill_backend.check(case))
    assert out["cu_seqlens_k"] == [0, INT32_MAX, -2, INT32_MAX - 2, -4, INT32_MAX - 4]
    assert out["nsa_cu_seqlens_k"][:4] == [0, INT32_MAX - 2, -5, INT32_MAX - 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_negative_rows_per_request_count_as_none(fill_backend: Backend, dtype: torch.dtype) -> None:
    case = Case(
        seq_lens=[9, 8, 7],
        extend_lens=[-1, 2, INT32_MIN],
        row_count=True,
        dtypes={"extend_lens": dtype},
        **BOTH_TABLES,
    )
    out = values_of(fill_backend.check(case))
    assert out["seqlens_expanded"] == [7, 8]
    assert out["row_count"] == [2]


def test_more_rows_per_request_than_tokens_and_than_int32(fill_backend: Backend) -> None:
    case = Case(
        seq_lens=[3, INT32_MAX, 5, 4],
        extend_lens=[6, 2**33, 2**62, INT32_MAX],
        rows=11,
        row_count=True,
        **BOTH_TABLES,
    )
    out = values_of(fill_backend.check(case))
    assert out["seqlens_expanded"][:6] == [0, 0, 0, 1, 2, 3]
    assert out["row_count"] == [11]


# Rows


@pytest.mark.parametrize("spare", [0, 1, 5, 300])
def test_rows_after_those_of_the_last_request(fill_backend: Backend, spare: int) -> None:
    case = Case(
        seq_lens=[12, 30, 2],
        extend_lens=[2, 1, 3],
        rows=6 + spare,
        ctx_dims=2,
        row_count=True,
        **BOTH_TABLES,
    )
    guarded = fill_backend.check(case)
    out = values_of(guarded)
    assert out["row_count"] == [6]
    assert out["seqlens_expanded"][6:] == [0] * spare
    assert out["nsa_cu_seqlens_k"][6:] == [out["nsa_cu_seqlens_k"][6]] * (spare + 1)
    assert (guarded.args.page_table_1[6:] == POISON).all()


@pytest.mark.parametrize("rows", range(8))
def test_requests_that_do_not_fit_are_cut_off(fill_backend: Backend, rows: int) -> None:
    case = Case(
        seq_lens=[12, 30, 2, 9], extend_lens=[2, 0, 3, 4], rows=rows, row_count=True, **BOTH_TABLES
    )
    assert values_of(fill_backend.check(case))["row_count"] == [rows]


@pytest.mark.parametrize("extend_lens", [4, 0, []], ids=["uniform", "no rows", "ragged"])
def test_no_requests(fill_backend: Backend, extend_lens: object) -> None:
    case = Case(
        seq_lens=[],
        extend_lens=extend_lens,  # type: ignore[arg-type]
        rows=5,
        row_count=True,
        ctx_dims=2,
        **BOTH_TABLES,
    )
    out = values_of(fill_backend.check(case))
    assert out["cu_seqlens_k"] == [0]
    assert set(out["nsa_cu_seqlens_k"]) == {0}
    assert out["row_count"] == [0]


def test_requests_without_rows(fill_backend: Backend) -> None:
    uniform = Case(seq_lens=[5, 6], extend_lens=0, row_count=True, ctx_dims=2, **BOTH_TABLES)
    ragged = replace(uniform, extend_lens=[0, 0], rows=2)
    assert values_of(fill_backend.check(uniform))["cu_seqlens_k"] == [0, 5, 11]
    assert values_of(fill_backend.check(ragged))["seqlens_expanded"] == [0, 0]


def test_uniform_and_ragged_agree(fill_backend: Backend) -> None:
    uniform = Case(seq_lens=[1, 40, 0, 47, 22], extend_lens=4, row_count=True, ctx_dims=1, **BOTH_TABLES)
    one, other = (fill_backend.check(case) for case in (uniform, replace(uniform, extend_lens=[4] * 5)))
    for name, tensor in one.args.outputs().items():
        assert torch.equal(tensor, other.args.outputs()[name]), name


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_batches_around_the_tile_sizes(fill_backend: Backend, tile: int, tiles: int, more: int) -> None:
    requests = range(tiles * tile + more)
    lengths = [(37 * r) % 61 for r in requests]
    extend_lens = [(r * r) % 4 for r in requests]
    uniform = Case(seq_lens=lengths, extend_lens=2, pool=7, **BOTH_TABLES)
    fill_backend.check(uniform)
    fill_backend.check(
        replace(uniform, extend_lens=extend_lens, rows=sum(extend_lens) + 3, row_count=True)
    )


# Page tables


@pytest.mark.parametrize("tokens", [39, 40, 41, 200])
@pytest.mark.parametrize("page_size", [1, 8])
def test_tables_narrower_and_wider_than_the_pool(
    fill_backend: Backend, tokens: int, page_size: int
) -> None:
    ends = [0, 1, 38, 39, 40, 41, 42, 199, 200, 201, 100_000]
    case = Case(seq_lens=ends, tokens=tokens, width=40)
    if page_size > 1:
        case = replace(case, page_size=page_size, pages=5)
    fill_backend.check(case)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191])
@pytest.mark.parametrize("page_size", [2, 3, 5, 7, 16, 64, 100, 1 << 22])
def test_last_page_of_a_request(fill_backend: Backend, page_size: int, length: int) -> None:
    pages = -(-192 // page_size)
    case = Case(
        seq_lens=[length], extend_lens=2, tokens=192, width=192, pages=pages, page_size=page_size
    )
    guarded = fill_backend.check(case)
    written = (guarded.args.real_page_table[0] != POISON).tolist()
    assert written == [page * page_size < length for page in range(pages)]


def test_cells_at_and_past_the_length_keep_what_they_held(fill_backend: Backend) -> None:
    lengths = list(range(14))  # the ends of a vector of four all occur
    guarded = fill_backend.check(Case(seq_lens=lengths, pool=14, width=16))
    for length, cells in zip(lengths, guarded.args.page_table_1.tolist(), strict=True):
        assert POISON not in cells[:length]
        assert cells[length:] == [POISON] * (16 - length)


@pytest.mark.parametrize(
    "tables",
    [{}, {"width": 40}, {"pages": 6, "page_size": 8}, BOTH_TABLES, {"page_size": 8}],
    ids=["none", "page size 1", "paged alone", "both", "page size, no table"],
)
def test_tables_left_out(fill_backend: Backend, tables: dict[str, int]) -> None:
    fill_backend.check(Case(seq_lens=[5, 33, 90], extend_lens=2, **tables))


@pytest.mark.parametrize("index", [-1, 5])
def test_request_indices_one_off_the_pool_read_slot_zero(fill_backend: Backend, index: int) -> None:
    """The row there is all guard cells: what is read of it would be seen."""
    case = Case(seq_lens=[20], indices=[index], pool=5, dtypes=ALL_INT32, **BOTH_TABLES)
    guarded = fill_backend.check(case)
    assert guarded.args.page_table_1[0].tolist() == [0] * 20 + [POISON] * 20


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_request_indices_outside_the_pool_read_slot_zero(
    fill_backend: Backend, dtype: torch.dtype
) -> None:
    indices = [4, 5, -1, INT32_MAX, INT32_MIN, 0]
    case = Case(seq_lens=[20] * 6, indices=indices, dtypes={"req_pool_indices": dtype})
    guarded = fill_backend.check(replace(case, **BOTH_TABLES))
    tables = guarded.args.page_table_1, guarded.args.real_page_table
    for table, cells in zip(tables, (20, 3), strict=True):
        assert (table[1:5, :cells] == 0).all()
        assert (table[[0, 5], :cells] != 0).all()


def test_int64_request_indices_are_not_cut_to_int32(fill_backend: Backend) -> None:
    indices = [2**32 + 1, -(2**63), 2**63 - 1]
    guarded = fill_backend.check(Case(seq_lens=[9] * 3, indices=indices, width=9))
    assert (guarded.args.page_table_1 == 0).all()


@pytest.mark.parametrize(("pool", "tokens"), [(0, 48), (5, 0), (0, 0)])
def test_empty_pools(fill_backend: Backend, pool: int, tokens: int) -> None:
    fill_backend.check(Case(seq_lens=[9, 30], pool=pool, tokens=tokens, **BOTH_TABLES))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_requests_in_any_order(fill_backend: Backend, dtype: torch.dtype) -> None:
    lengths = [1, 30, 17, 1, 44, 1]
    case = Case(
        seq_lens=lengths,
        indices=[3, 0, 3, 0, 4, 0],  # padded requests share row 0
        extend_lens=2,
        dtypes=dict.fromkeys(INDEX_INPUTS, dtype),
        **BOTH_TABLES,
    )
    fill_backend.check(case)


def test_negative_slots_round_down(fill_backend: Backend) -> None:
    case = Case(seq_lens=[30], **BOTH_TABLES)
    args = Guarded(case, fill_backend.device).args
    args.req_to_token.copy_(torch.arange(-20, 28))
    fill_backend.fill(args)
    assert args.page_table_1[0, :30].tolist() == list(range(-20, 10))
    assert args.real_page_table[0, :4].tolist() == [-3, -2, -1, 0]  # of -20, -12, -4, 4


# Memory


@pytest.mark.parametrize("width", [193, 257, 769])
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_rows_and_bases_that_no_vector_fits(
    fill_backend: Backend, width: int, offset: int, gap: int
) -> None:
    lengths = [width - 1, width, width + 1, 66]
    layout = Layout(offset=offset, gap=gap)
    names = ("req_to_token", "page_table_1", "real_page_table")
    case = Case(
        seq_lens=lengths,
        extend_lens=2,
        tokens=width + 2,
        width=width,
        pages=-(-width // 64),
        page_size=64,
        dtypes=ALL_INT32,
        layouts=dict.fromkeys(names, layout),
    )
    fill_backend.check(case)
    # the two sides of a copy may be off by different amounts
    fill_backend.check(replace(case, layouts={**case.layouts, "page_table_1": DENSE}))


@pytest.mark.parametrize(
    "columns", [3, 4, 5, 127, 129, 511, 513, 1023, 1024, 1025, 2049, 4095, 4096, 4097]
)
def test_tables_around_the_copied_blocks(fill_backend: Backend, columns: int) -> None:
    lengths = [columns - 1, columns, columns + 1]
    case = Case(seq_lens=lengths, tokens=columns + 1, width=columns, dtypes=ALL_INT32)
    fill_backend.check(case)
    aligned = dict.fromkeys(("req_to_token", "page_table_1"), DENSE)
    fill_backend.check(replace(case, layouts=aligned))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_inputs_and_outputs(fill_backend: Backend, dtype: torch.dtype) -> None:
    case = Case(
        seq_lens=[7, 41, 0, 90],
        extend_lens=[2, 3, 1, 2],
        rows=10,
        ctx_dims=2,
        row_count=True,
        enabled=1,
        dtypes=dict.fromkeys(INDEX_INPUTS, dtype),
        **BOTH_TABLES,
    )
    names = (*case.input_values(), *case.output_shapes())
    for step, offset in ((2, 1), (3, 2), (5, 3)):
        layout = Layout(step=step, offset=offset, gap=1)
        fill_backend.check(replace(case, layouts=dict.fromkeys(names, layout)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("step", [1, 2])
def test_transposed_req_to_token(fill_backend: Backend, dtype: torch.dtype, step: int) -> None:
    layout = Layout(transposed=True, step=step, gap=3, offset=1)
    case = Case(
        seq_lens=[7, 41, 0, 90],
        extend_lens=2,
        tokens=47,
        dtypes={"req_to_token": dtype},
        layouts={"req_to_token": layout},
        **BOTH_TABLES,
    )
    fill_backend.check(case)


def test_inputs_of_stride_zero(fill_backend: Backend) -> None:
    plain = Case(seq_lens=[31] * 4, extend_lens=[2] * 4, indices=[3] * 4, rows=9, **BOTH_TABLES)
    guarded = Guarded(plain, fill_backend.device)
    one = {
        name: guarded.args.inputs()[name][:1].expand(4)
        for name in ("seq_lens", "extend_lens", "req_pool_indices")
    }
    tensors = guarded.args.inputs() | guarded.args.outputs() | one
    guarded.args = fill_args(plain, **tensors)
    guarded.check(fill_backend.fill)


@pytest.mark.parametrize(
    "name",
    [
        "page_table_1",
        "real_page_table",
        "req_to_token",
        "seq_lens",
        "extend_lens",
        "req_pool_indices",
        "cache_seqlens",
        "cu_seqlens_k",
        "seqlens_expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "ctx_lens",
    ],
)
@pytest.mark.vast
@pytest.mark.unsanitized("it notes of each byte of 17 GB whether it was written", tools=("initcheck",))
def test_offsets_above_int32(fill_backend: Backend, name: str) -> None:
    """Element 2 of the tensor, or its row 2, lies more than 2**31 elements after element 0."""
    bs = 2 if "cu_seqlens" in name else 3  # running sums have one element more
    case = Case(
        seq_lens=[33, 9, 38][:bs],
        extend_lens=[1] * bs,
        indices=[1, 0, 2][:bs],
        pool=3,
        ctx_dims=1,
        dtypes=ALL_INT32,
        **BOTH_TABLES,
    )
    guarded = fill_backend.check(case)
    wanted = {key: tensor.clone() for key, tensor in guarded.args.outputs().items()}
    guarded.poison()

    tensors = guarded.args.inputs() | guarded.args.outputs()
    near = tensors[name]
    strides = (2**30 + 40, 1)[: near.dim()]
    vast = vast_vector(fill_backend.device)
    tensors[name] = vast.as_strided(near.shape, strides, 2**31)
    tensors[name].copy_(near)
    args = fill_args(case, **tensors)
    fill_backend.fill(args)
    for key, tensor in args.outputs().items():
        assert torch.equal(tensor, wanted[key]), key
    landing = vast.as_strided(near.shape, (40, 1)[: near.dim()], 0)  # of an offset that wrapped
    assert not landing[2].any()


# The switch


def test_disabled_fills_write_nothing(fill_backend: Backend) -> None:
    case = Case(
        seq_lens=[5, 33],
        extend_lens=[1, 2],
        rows=4,
        row_count=True,
        ctx_dims=2,
        enabled=0,
        **BOTH_TABLES,
    )
    guarded = fill_backend.check(case)
    for name, tensor in guarded.args.outputs().items():
        assert (tensor == POISON).all(), name


@pytest.mark.parametrize("enabled", [1, -1, INT32_MIN])
def test_enabled_fills_write(fill_backend: Backend, enabled: int) -> None:
    guarded = fill_backend.check(Case(seq_lens=[5, 33], enabled=enabled, **BOTH_TABLES))
    assert guarded.args.cache_seqlens.tolist() == [5, 33]


def test_the_switch_is_read_by_every_fill(fill_backend: Backend) -> None:
    guarded = Guarded(Case(seq_lens=[5, 33], enabled=0, **BOTH_TABLES), fill_backend.device)
    bound = fill_backend.bind(guarded.args)
    for enabled in (0, 1, 0, 1):
        guarded.args.enabled.fill_(enabled)
        guarded.poison()
        guarded.check(lambda _: bound())


# Bound once, filled often


def test_a_bound_fill_follows_its_inputs(fill_backend: Backend) -> None:
    case = Case(seq_lens=[5, 33, 1], extend_lens=[2, 2, 2], rows=8, row_count=True, **BOTH_TABLES)
    guarded = Guarded(case, fill_backend.device)
    bound = fill_backend.bind(guarded.args)
    tensors = guarded.args.inputs() | guarded.args.outputs()
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    rounds = [
        ([64, 1, 40], [2, 2, 2], [0, 1, 2]),
        ([1, 64, 40], [3, 0, 1], [2, 2, 0]),
        ([0, 0, 100_001], [0, 0, 0], [4, 9, 1]),
        ([64, 1, 40], [2, 2, 2], [0, 1, 2]),
    ]
    for lengths, extend_lens, indices in rounds:
        guarded.args.seq_lens.copy_(torch.tensor(lengths))
        guarded.args.extend_lens.copy_(torch.tensor(extend_lens))
        guarded.args.req_pool_indices.copy_(torch.tensor(indices))
        guarded.poison()
        guarded.check(lambda _: bound())
    assert pointers == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_longer_fill_leaves_no_trace_in_live_cells(fill_backend: Backend) -> None:
    """The tail of a table is stale on purpose; what is live is always new."""
    case = Case(seq_lens=[40, 40], extend_lens=2, dtypes=ALL_INT32, **BOTH_TABLES)
    guarded = Guarded(case, fill_backend.device)
    bound = fill_backend.bind(guarded.args)
    guarded.check(lambda _: bound())
    guarded.args.seq_lens.copy_(torch.tensor([13, 1]))
    guarded.args.req_pool_indices.copy_(torch.tensor([3, 4]))
    guarded.check(lambda _: bound())


# DeepGEMM's schedule


@pytest.mark.parametrize("remainder_last", [False, True])
@pytest.mark.parametrize("processors", [1, 7, 132, 300])
def test_schedules(fill_backend: Backend, processors: int, remainder_last: bool) -> None:
    for lengths in ([0, 0], [1], [255, 256, 257, 258], [0, 40_000, 3, 0], [131_072], [*range(250, 290)]):
        case = Case(
            seq_lens=lengths, extend_lens=4, processors=processors, remainder_last=remainder_last
        )
        fill_backend.check(case)


def test_a_schedule_begins_where_the_segments_say(fill_backend: Backend) -> None:
    """Rows of 256, 257, 258 tokens: 1 + 2 + 2 segments, of which three processors take 2 + 2 + 1."""
    case = Case(seq_lens=[258], extend_lens=3, processors=3)
    assert values_of(fill_backend.check(case))["mqa_schedule"] == [[0, 0], [1, 1], [2, 1], [3, 0]]
    last = replace(case, remainder_last=True)
    assert values_of(fill_backend.check(last))["mqa_schedule"] == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_schedules_of_many_requests(fill_backend: Backend, tile: int) -> None:
    for count in (tile, 2 * tile + 1, 5 * tile):
        lengths = [(977 * r) % 3000 for r in range(count)]
        fill_backend.check(Case(seq_lens=lengths, extend_lens=3, processors=132, remainder_last=True))


@pytest.mark.parametrize("length", [INT32_MAX, INT32_MIN, -1])
def test_schedules_of_extreme_lengths(fill_backend: Backend, length: int) -> None:
    for lengths in ([length], [length, 300, length], [length] * 70):
        fill_backend.check(Case(seq_lens=lengths, extend_lens=4, processors=132))


# By request: lengths [bs, q], as DeepGEMM's kernels for several tokens of a request take them (SM100)


@pytest.mark.parametrize("q", range(2, 9))
def test_context_lengths_by_request(fill_backend: Backend, q: int) -> None:
    """Verify of q draft tokens: each column is the length with all of them, not that of its row."""
    case = Case(seq_lens=[18, 0, -q, 300, -q - 1], length_offset=q, extend_lens=q, by_request=True)
    out = values_of(fill_backend.check(replace(case, row_count=True, **BOTH_TABLES)))
    assert out["ctx_lens"] == [[18 + q] * q, [q] * q, [0] * q, [300 + q] * q, [-1] * q]
    assert out["cache_seqlens"] == [18 + q, q, 0, 300 + q, -1]
    assert out["seqlens_expanded"][: 2 * q] == [*range(19, 19 + q), *range(1, 1 + q)]


@pytest.mark.parametrize("remainder_last", [False, True])
@pytest.mark.parametrize("processors", [1, 2, 7, 148, 300])
@pytest.mark.parametrize("q", [2, 3, 4, 7])
def test_schedules_by_request(
    fill_backend: Backend, q: int, processors: int, remainder_last: bool
) -> None:
    lengths = [0, 1, 255, 256, 257, 0, 40_000, 512, 513, -3, 0]
    case = Case(seq_lens=lengths, extend_lens=q, by_request=True)
    fill_backend.check(replace(case, processors=processors, remainder_last=remainder_last))


def test_a_schedule_by_request_begins_where_all_rows_do(fill_backend: Backend) -> None:
    """2, 0 and 3 segments, each of 2 rows: 10 for four processors, 3, 3, 2 and 2."""
    case = Case(seq_lens=[300, 0, 600], extend_lens=2, by_request=True, processors=4)
    # the second begins with the second row of segment 1, so with segment 1; the third amid segment 1
    starts = [[0, 0], [0, 1], [4, 1], [4, 2], [6, 0]]
    assert values_of(fill_backend.check(case))["mqa_schedule"] == starts
    last = replace(case, remainder_last=True)  # 2, 2, 3 and 3
    assert values_of(fill_backend.check(last))["mqa_schedule"] == [
        [0, 0],
        [0, 1],
        [4, 0],
        [4, 1],
        [6, 0],
    ]


def test_schedules_by_request_of_many_requests(fill_backend: Backend, tile: int) -> None:
    lengths = [(r * 7919) % 3000 * (r % 5 > 0) for r in range(2 * tile + 3)]
    case = Case(seq_lens=lengths, extend_lens=3, by_request=True, processors=132)
    fill_backend.check(case)


@pytest.mark.parametrize("length", [INT32_MAX, INT32_MIN, -1])
def test_schedules_by_request_of_extreme_lengths(fill_backend: Backend, length: int) -> None:
    case = Case(seq_lens=[length, 5, length], extend_lens=4, by_request=True, processors=7)
    fill_backend.check(case)


@pytest.mark.parametrize("layout", [Layout(offset=1, step=2, gap=3), Layout(offset=3, gap=1)])
def test_context_lengths_by_request_with_strides(fill_backend: Backend, layout: Layout) -> None:
    case = Case(seq_lens=[9, 30, 4], extend_lens=4, by_request=True, processors=3, enabled=1)
    fill_backend.check(replace(case, layouts={"ctx_lens": layout, "mqa_schedule": layout}))


def test_a_disabled_fill_by_request_writes_nothing(fill_backend: Backend) -> None:
    case = Case(seq_lens=[9, 30], extend_lens=4, by_request=True, processors=3, enabled=0)
    out = values_of(fill_backend.check(case))
    assert {cell for row in out["ctx_lens"] for cell in row} == {POISON}
