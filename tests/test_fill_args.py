"""Bad arguments: what is refused, and in which words. All implementations share this validation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import INT32_MAX, Case, Guarded
from torch._subclasses import FakeTensorMode

from sglang_nsa_plugin import FillArgs

CASE = Case(
    seq_lens=[9, 30],
    extend_lens=[3, 3],
    ctx_dims=2,
    row_count=True,
    enabled=1,
    width=40,
    pages=5,
    page_size=8,
)
INPUTS = ("seq_lens", "req_pool_indices", "req_to_token", "extend_lens")
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
)
OPTIONAL = ("ctx_lens", "page_table_1", "real_page_table", "row_count", "enabled")
VECTORS = (
    "seq_lens",
    "req_pool_indices",
    "extend_lens",
    "enabled",
    *OUTPUTS[:5],
    "row_count",
)
TABLES = ("req_to_token", "page_table_1", "real_page_table")


@pytest.fixture
def valid() -> dict[str, object]:
    """Valid keyword arguments: two requests of three rows, no tensor left out."""
    args = Guarded(CASE).args
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(FillArgs)}


def refused(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error) as caught:
        FillArgs(**arguments)
    assert str(caught.value) == message


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_the_valid_arguments_are_taken(valid: dict) -> None:
    args = FillArgs(**valid)
    assert (args.bs, args.rows, args.device) == (2, 6, torch.device("cpu"))
    assert list(args.inputs()) == [*INPUTS, "enabled"]
    assert list(args.outputs()) == list(OUTPUTS)


def test_optional_tensors_may_be_left_out(valid: dict) -> None:
    args = FillArgs(**valid | dict.fromkeys((*OPTIONAL, "req_pool_indices", "req_to_token")))
    assert list(args.inputs()) == ["seq_lens", "extend_lens"]
    assert list(args.outputs()) == list(OUTPUTS[:5])


def test_unvalidated_arguments_are_the_same_object_without_a_look(valid: dict) -> None:
    wrong = valid | {"cache_seqlens": int32(99)}
    del wrong["mqa_schedule"]
    args = FillArgs.unvalidated(**wrong)
    assert args.cache_seqlens is wrong["cache_seqlens"]
    assert (args.bs, args.rows, args.mqa_schedule) == (2, 6, None)
    assert list(args.outputs()) == list(OUTPUTS)


def test_the_object_is_frozen(valid: dict) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FillArgs(**valid).page_size = 4  # type: ignore[misc]


# Numbers


@pytest.mark.parametrize("name", ["index_topk", "page_size"])
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (True, TypeError, "must be an int, got bool"),
        (64.0, TypeError, "must be an int, got float"),
        ("64", TypeError, "must be an int, got str"),
        (None, TypeError, "must be an int, got NoneType"),
        (np.bool_(True), TypeError, "must be an int, got numpy.bool"),
        (np.float32(64), TypeError, "must be an int, got numpy.float32"),
        (np.array([64]), TypeError, "must be an int, got numpy.ndarray"),
        (torch.tensor(64), TypeError, "must be an int, got Tensor"),
        (0, ValueError, "must lie in 1 .. 2147483647, got 0"),
        (-64, ValueError, "must lie in 1 .. 2147483647, got -64"),
        (2**31, ValueError, "must lie in 1 .. 2147483647, got 2147483648"),
        (np.int64(2**31), ValueError, "must lie in 1 .. 2147483647, got 2147483648"),
        (np.uint8(0), ValueError, "must lie in 1 .. 2147483647, got 0"),
    ],
)
def test_numbers(valid: dict, name: str, value: object, error: type, rule: str) -> None:
    refused(error, f"{name}: {rule}", valid | {name: value})


@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (True, TypeError, "must be an int or a tensor, got bool"),
        (3.0, TypeError, "must be an int or a tensor, got float"),
        ([3, 3], TypeError, "must be an int or a tensor, got list"),
        (None, TypeError, "must be an int or a tensor, got NoneType"),
        (-1, ValueError, "must lie in 0 .. 2147483647, got -1"),
        (2**31, ValueError, "must lie in 0 .. 2147483647, got 2147483648"),
    ],
)
def test_extend_lens_as_a_number(valid: dict, value: object, error: type, rule: str) -> None:
    refused(error, f"extend_lens: {rule}", valid | {"extend_lens": value})


@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (True, TypeError, "must be an int, got bool"),
        (4.0, TypeError, "must be an int, got float"),
        (None, TypeError, "must be an int, got NoneType"),
        (torch.tensor([4, 4]), TypeError, "must be an int, got Tensor"),
        (-1, ValueError, "must lie in 0 .. 2147483647, got -1"),
        (2**31, ValueError, "must lie in 0 .. 2147483647, got 2147483648"),
    ],
)
def test_length_offset(valid: dict, value: object, error: type, rule: str) -> None:
    refused(error, f"length_offset: {rule}", valid | {"length_offset": value})


def test_the_length_offset_is_0_when_left_out(valid: dict) -> None:
    del valid["length_offset"]
    assert FillArgs(**valid).length_offset == 0
    assert FillArgs.unvalidated(**valid).length_offset == 0


class Index:
    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "three", [np.int64(3), np.uint8(3), np.array(3), Index()], ids=["int64", "uint8", "array", "Index"]
)
def test_whole_numbers_of_other_types_become_ints(valid: dict, three: object) -> None:
    numbers = ("index_topk", "page_size", "extend_lens", "length_offset")
    args = FillArgs(**valid | dict.fromkeys(numbers, three))
    assert [(type(getattr(args, name)), getattr(args, name)) for name in numbers] == [(int, 3)] * 4


def test_the_switch_of_the_remainder_is_a_bool(valid: dict) -> None:
    rule = "mqa_remainder_last: must be a bool, got"
    refused(TypeError, f"{rule} int", valid | {"mqa_remainder_last": 1})
    refused(TypeError, f"{rule} numpy.bool", valid | {"mqa_remainder_last": np.bool_(True)})


def test_the_ends_of_the_numbers_are_taken(valid: dict) -> None:
    FillArgs(**valid | {"index_topk": 1, "page_size": 2, "length_offset": 0})
    FillArgs(**valid | dict.fromkeys(("index_topk", "page_size", "length_offset"), 2**31 - 1))


# Tensors without memory


@pytest.mark.parametrize("name", [*INPUTS, "enabled", *OUTPUTS])
def test_fake_tensors(valid: dict, name: str) -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(valid[name])
        rule = "must be a tensor with memory of its own, got a FakeTensor"
        refused(TypeError, f"{name}: {rule}", valid | {name: fake})
    refused(TypeError, f"{name}: {rule}", valid | {name: fake})


def test_all_tensors_fake(valid: dict) -> None:
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in valid.items() if isinstance(t, torch.Tensor)}
        with pytest.raises(TypeError, match=r"^seq_lens: must be a tensor with memory of its own"):
            FillArgs(**valid | fake)


@pytest.mark.parametrize("name", [*INPUTS[1:], "enabled", *OUTPUTS])
def test_meta_tensors(valid: dict, name: str) -> None:
    rule = "must be on cpu like seq_lens, got a tensor on meta"
    refused(ValueError, f"{name}: {rule}", valid | {name: valid[name].to("meta")})


def test_a_tensor_inside_vmap(valid: dict) -> None:
    def one(seq_lens: torch.Tensor) -> torch.Tensor:
        FillArgs(**valid | {"seq_lens": seq_lens})
        return seq_lens

    rule = "seq_lens: must be a tensor with memory of its own, got one inside a torch.func transform"
    with pytest.raises(TypeError, match=f"^{rule}$"):
        torch.vmap(one)(torch.ones(3, 2, dtype=torch.int32))


def test_a_tensor_whose_storage_was_freed(valid: dict) -> None:
    freed = int32(2)
    freed.untyped_storage().resize_(0)
    rule = "must be a tensor with memory of its own, got one whose address is 0"
    refused(ValueError, f"cache_seqlens: {rule}", valid | {"cache_seqlens": freed})


# Types and dtypes


@pytest.mark.parametrize("name", ["seq_lens", *OUTPUTS[:2], *OUTPUTS[3:5]])
def test_required_tensors(valid: dict, name: str) -> None:
    refused(TypeError, f"{name}: must be a torch.Tensor, got NoneType", valid | {name: None})


def one_row_each(valid: dict) -> dict:
    """The two requests with one row each."""
    rows = {name: int32(2) for name in ("seqlens_expanded", "nsa_cache_seqlens")}
    tables = {"page_table_1": int32(2, 40), "real_page_table": int32(2, 5)}
    return valid | rows | tables | {"extend_lens": 1, "nsa_cu_seqlens_k": int32(3), "ctx_lens": int32(2)}


def test_expanded_lengths_may_be_left_out_of_one_row_a_request(valid: dict) -> None:
    args = FillArgs(**one_row_each(valid) | {"seqlens_expanded": None})
    assert args.rows == 2
    assert "seqlens_expanded" not in args.outputs()


@pytest.mark.parametrize("extend_lens", [0, 3, torch.ones(2, dtype=torch.int32)])
def test_expanded_lengths_of_other_batches_are_required(valid: dict, extend_lens: object) -> None:
    message = "seqlens_expanded: must be a torch.Tensor when extend_lens is not 1, got NoneType"
    refused(TypeError, message, valid | {"extend_lens": extend_lens, "seqlens_expanded": None})


@pytest.mark.parametrize(
    "name", ["nsa_cache_seqlens", "nsa_cu_seqlens_k", "ctx_lens", "page_table_1", "real_page_table"]
)
def test_rows_without_expanded_lengths(valid: dict, name: str) -> None:
    decode = one_row_each(valid) | {"seqlens_expanded": None}
    with pytest.raises(ValueError, match=f"^{name}: "):
        FillArgs(**decode | {name: int32(*(n + 1 for n in decode[name].shape))})


@pytest.mark.parametrize("name", [*INPUTS[:3], "enabled", *OUTPUTS])
def test_what_is_no_tensor(valid: dict, name: str) -> None:
    refused(TypeError, f"{name}: must be a torch.Tensor, got list", valid | {name: [1]})
    refused(TypeError, f"{name}: must be a torch.Tensor, got int", valid | {name: 3})


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8", "bool", "bfloat16"])
def test_dtypes_of_inputs(valid: dict, name: str, dtype: str) -> None:
    tensor = valid[name].to(getattr(torch, dtype))
    message = f"{name}: dtype must be int32 or int64, got {dtype}"
    refused(TypeError, message, valid | {name: tensor})


@pytest.mark.parametrize("name", [*OUTPUTS, "enabled"])
@pytest.mark.parametrize("dtype", ["int64", "float32", "uint8", "bool"])
def test_dtypes_of_outputs_and_of_the_switch(valid: dict, name: str, dtype: str) -> None:
    tensor = valid[name].to(getattr(torch, dtype))
    refused(TypeError, f"{name}: dtype must be int32, got {dtype}", valid | {name: tensor})


@pytest.mark.parametrize("name", [*INPUTS[1:], "enabled", *OUTPUTS])
def test_devices(valid: dict, name: str) -> None:
    message = f"{name}: must be on cpu like seq_lens, got a tensor on meta"
    refused(ValueError, message, valid | {name: valid[name].to("meta")})


# Ranks and shapes


@pytest.mark.parametrize("name", VECTORS)
def test_ranks_of_vectors(valid: dict, name: str) -> None:
    tensor = valid[name].contiguous()
    shape = tuple(tensor[None].shape)
    message = f"{name}: must have 1 dimension, got shape {shape}"
    refused(ValueError, message, valid | {name: tensor[None]})
    refused(
        ValueError,
        f"{name}: must have 1 dimension, got shape ()",
        valid | {name: tensor.flatten()[0].clone()},
    )


@pytest.mark.parametrize("name", TABLES)
def test_ranks_of_tables(valid: dict, name: str) -> None:
    tensor = valid[name].contiguous()
    refused(
        ValueError,
        f"{name}: must have 2 dimensions, got shape ({tensor.numel()},)",
        valid | {name: tensor.flatten()},
    )
    refused(
        ValueError,
        f"{name}: must have 2 dimensions, got shape {(1, *tensor.shape)}",
        valid | {name: tensor[None]},
    )


def test_rank_of_ctx_lens(valid: dict) -> None:
    FillArgs(**valid | {"ctx_lens": int32(6)})
    message = "ctx_lens: must have 1 or 2 dimensions, got shape (6, 1, 1)"
    refused(ValueError, message, valid | {"ctx_lens": int32(6, 1, 1)})


@pytest.mark.parametrize(
    ("name", "size"),
    {
        "req_pool_indices": 2,
        "extend_lens": 2,
        "cache_seqlens": 2,
        "cu_seqlens_k": 3,
        "nsa_cache_seqlens": 6,
        "nsa_cu_seqlens_k": 7,
        "row_count": 1,
        "enabled": 1,
    }.items(),
)
def test_sizes_of_vectors(valid: dict, name: str, size: int) -> None:
    for wrong in (size - 1, size + 1):
        message = f"{name}: shape must be ({size},) for bs=2, rows=6, got ({wrong},)"
        refused(ValueError, message, valid | {name: int32(wrong)})


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 2), (5, 1), (1, 6), (6, 0)])
def test_shape_of_ctx_lens(valid: dict, shape: tuple) -> None:
    wanted = (6,) if len(shape) == 1 else (6, 1)
    message = f"ctx_lens: shape must be {wanted} for bs=2, rows=6, got {shape}"
    refused(ValueError, message, valid | {"ctx_lens": int32(*shape)})


def test_context_lengths_by_request_have_a_column_for_each_row(valid: dict) -> None:
    uniform = valid | {"extend_lens": 3}
    for shape, by_request in {(2, 3): True, (6, 1): False, (6,): False}.items():
        assert FillArgs(**uniform | {"ctx_lens": int32(*shape)}).is_by_request is by_request
    assert not FillArgs(**uniform).is_by_request
    for wrong in ((2, 2), (2, 4), (3, 3), (6, 3)):
        message = f"ctx_lens: shape must be (6, 1) or (2, 3) for bs=2, rows=6, got {wrong}"
        refused(ValueError, message, uniform | {"ctx_lens": int32(*wrong)})
    message = "ctx_lens: shape must be (6, 1) for bs=2, rows=6, got (2, 3)"
    refused(ValueError, message, valid | {"ctx_lens": int32(2, 3)})  # ragged


@pytest.mark.parametrize("shape", [(1, 2), (0, 2), (3, 1), (3, 3)])
def test_shape_of_mqa_schedule(valid: dict, shape: tuple) -> None:
    uniform = valid | {"extend_lens": 3}
    FillArgs(**uniform | {"mqa_schedule": int32(2, 2)})
    message = f"mqa_schedule: must have shape (P + 1, 2) for P processors, 1 or more, got {shape}"
    refused(ValueError, message, uniform | {"mqa_schedule": int32(*shape)})


def test_a_schedule_is_for_a_uniform_batch(valid: dict) -> None:
    message = "mqa_schedule: must be None when extend_lens is a tensor"
    refused(TypeError, message, valid | {"mqa_schedule": int32(9, 2)})


@pytest.mark.parametrize("name", TABLES[1:])
def test_rows_of_tables(valid: dict, name: str) -> None:
    for rows in (5, 7):
        message = f"{name}: must have 6 rows like seqlens_expanded, got shape ({rows}, 5)"
        refused(ValueError, message, valid | {name: int32(rows, 5)})


@pytest.mark.parametrize("rows", [5, 7, 0])
def test_a_number_asks_for_exact_rows(valid: dict, rows: int) -> None:
    message = f"seqlens_expanded: shape must be (6,) for 2 requests of 3 rows each, got ({rows},)"
    refused(ValueError, message, valid | {"extend_lens": 3, "seqlens_expanded": int32(rows)})


def test_a_tensor_takes_any_number_of_rows(valid: dict) -> None:
    for rows in (0, 1, 100):
        outputs = {
            "seqlens_expanded": int32(rows),
            "nsa_cache_seqlens": int32(rows),
            "nsa_cu_seqlens_k": int32(rows + 1),
            "ctx_lens": int32(rows, 1),
            "page_table_1": int32(rows, 3),
            "real_page_table": int32(rows, 0),
        }
        assert FillArgs(**valid | outputs).rows == rows


def test_sizes_beyond_int32(valid: dict) -> None:
    shape = (1, 2**31)
    vast = torch.zeros(1, dtype=torch.int32).expand(*shape)
    message = f"req_to_token: sizes must lie below 2**31, got shape {shape}"
    refused(ValueError, message, valid | {"req_to_token": vast})


# Page tables


@pytest.mark.parametrize("source", ["req_to_token", "req_pool_indices"])
@pytest.mark.parametrize("name", TABLES[1:])
def test_tables_need_their_source(valid: dict, name: str, source: str) -> None:
    other = TABLES[1] if name == TABLES[2] else TABLES[2]
    message = f"{source}: must be a torch.Tensor when {name} is given, got NoneType"
    refused(TypeError, message, valid | {source: None, other: None})


def test_no_real_page_table_with_page_size_one(valid: dict) -> None:
    message = "real_page_table: must be None when page_size is 1: it would equal page_table_1"
    refused(ValueError, message, valid | {"page_size": 1})
    FillArgs(**valid | {"page_size": 1, "real_page_table": None})


# Memory


def strided(shape: tuple, strides: tuple) -> torch.Tensor:
    return int32(4000).as_strided(shape, strides)


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "cache_seqlens": (2,),
        "cu_seqlens_k": (3,),
        "seqlens_expanded": (6,),
        "nsa_cache_seqlens": (6,),
        "nsa_cu_seqlens_k": (7,),
        "ctx_lens": (6,),
    }.items(),
)
def test_vectors_of_stride_zero(valid: dict, name: str, shape: tuple) -> None:
    message = (
        f"{name}: cells must not share memory, and each row must begin after the one before it, "
        f"got strides (0,) for shape {shape}"
    )
    refused(ValueError, message, valid | {name: strided(shape, (0,))})


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((6, 40), (0, 1)),
        ((6, 40), (40, 0)),
        ((6, 40), (39, 1)),
        ((6, 40), (79, 2)),  # the next row lies in the gaps, and its end on this row's end
        ((6, 40), (78, 2)),
        ((6, 40), (1, 6)),  # transposed
    ],
)
def test_tables_whose_rows_overlap(valid: dict, shape: tuple, strides: tuple) -> None:
    message = (
        "page_table_1: cells must not share memory, and each row must begin after the one before it, "
        f"got strides {strides} for shape {shape}"
    )
    arguments = valid | {"page_table_1": strided(shape, strides)}
    if strides == (79, 2):
        FillArgs(**arguments)  # the last cell of a row is its 78th: the next row begins after it
    else:
        refused(ValueError, message, arguments)


def test_strides_of_single_cells_and_rows_do_not_count(valid: dict) -> None:
    FillArgs(**valid | {"row_count": strided((1,), (0,)), "ctx_lens": strided((6, 1), (1, 0))})
    one_row = {
        "seqlens_expanded": int32(1),
        "nsa_cache_seqlens": int32(1),
        "nsa_cu_seqlens_k": int32(2),
        "ctx_lens": None,
        "page_table_1": strided((1, 40), (0, 1)),
        "real_page_table": None,
    }
    FillArgs(**valid | one_row)


def span(tensor: torch.Tensor) -> str:
    """The bytes of a contiguous tensor, in the words of the message."""
    start = tensor.data_ptr()
    return f"[{start:#x}, {start + tensor.numel() * tensor.element_size():#x})"


def test_outputs_that_overlap(valid: dict) -> None:
    memory = int32(12)
    one, other = memory[:6], memory[5:11]
    message = (
        "seqlens_expanded: must not overlap nsa_cache_seqlens in memory, "
        f"got bytes {span(one)} and {span(other)}"
    )
    refused(ValueError, message, valid | {"seqlens_expanded": one, "nsa_cache_seqlens": other})
    neighbour = {"seqlens_expanded": one, "nsa_cache_seqlens": memory[6:]}
    FillArgs(**valid | neighbour)


def test_one_tensor_as_two_outputs(valid: dict) -> None:
    table = int32(6, 8)
    message = (
        "page_table_1: must not overlap real_page_table in memory, "
        f"got bytes {span(table)} and {span(table)}"
    )
    refused(ValueError, message, valid | {"page_table_1": table, "real_page_table": table})


@pytest.mark.parametrize("name", [*INPUTS, "enabled"])
def test_outputs_that_overlap_an_input(valid: dict, name: str) -> None:
    memory = int32(400)
    shape = valid[name].shape
    source = memory[: shape.numel()].view(shape)
    output = memory[shape.numel() - 1 :][:2]
    message = (
        f"cache_seqlens: must not overlap {name} in memory, got bytes {span(output)} and {span(source)}"
    )
    refused(ValueError, message, valid | {name: source, "cache_seqlens": output})
    after = memory[shape.numel() :][:2]
    FillArgs(**valid | {name: source, "cache_seqlens": after})


def test_an_output_in_the_middle_of_an_input_is_found(valid: dict) -> None:
    memory = int32(5 * 48)
    pool, output = memory.view(5, 48), memory[100:102]
    with pytest.raises(ValueError, match=r"^cache_seqlens: must not overlap req_to_token in mem"):
        FillArgs(**valid | {"req_to_token": pool, "cache_seqlens": output})


def test_inputs_may_share_memory_and_have_stride_zero(valid: dict) -> None:
    one = torch.tensor([2]).expand(2)
    FillArgs(**valid | {"seq_lens": one, "extend_lens": one, "req_pool_indices": one})


def test_empty_outputs_overlap_nothing(valid: dict) -> None:
    memory = int32(40)
    empty = {
        "seqlens_expanded": memory[:0],
        "nsa_cache_seqlens": memory[:0],
        "nsa_cu_seqlens_k": memory[:1],
        "ctx_lens": memory[:0],
        "page_table_1": memory[:0].view(0, 8),
        "real_page_table": None,
    }
    FillArgs(**valid | empty)


def test_an_output_of_one_cell_overlaps_another_output(valid: dict) -> None:
    one = valid["cache_seqlens"][:1]
    with pytest.raises(ValueError, match=r"^cache_seqlens: must not overlap row_count in memory"):
        FillArgs(**valid | {"row_count": one})


def test_2_to_the_31_minus_1_columns_are_not_too_many(valid: dict) -> None:
    FillArgs(**valid | {"req_to_token": int32(1, 1).expand(5, INT32_MAX)})


@pytest.mark.parametrize("left_out", [{"ctx_lens": None}, {"extend_lens": 3}])
def test_tensors_after_one_that_is_left_out_are_validated(valid: dict, left_out: dict) -> None:
    message = "row_count: dtype must be int32, got int64"
    refused(TypeError, message, valid | left_out | {"row_count": torch.zeros(1, dtype=torch.int64)})


def test_the_message_names_the_device_or_the_layout(valid: dict) -> None:
    message = "seq_lens: must be a CPU or CUDA tensor, got one on meta"
    refused(ValueError, message, valid | {"seq_lens": valid["seq_lens"].to("meta")})
    message = "seq_lens: must be a dense tensor, got one of layout torch.sparse_coo"
    refused(TypeError, message, valid | {"seq_lens": torch.arange(2).to_sparse()})
