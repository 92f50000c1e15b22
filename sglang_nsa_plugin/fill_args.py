"""The contract of a metadata fill: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

INT32_MAX = 2**31 - 1
INDEX_DTYPES = (torch.int32, torch.int64)
SEGMENT = 256  # tokens in a segment of DeepGEMM's schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class FillArgs:
    """The tensors of one fill, validated when the object is made.

    Request r of ``bs`` has ``L = seq_lens[r] + length_offset`` tokens in the KV cache, of which the last
    ``q = extend_lens[r]`` are the rows ``t = first(r) + j, 0 <= j < q`` of this forward, where
    ``first(r)`` is the sum of q over the requests before r. A fill writes, all int32:

    =================== ===================== =====================================================
    cache_seqlens       [bs]                  L
    cu_seqlens_k        [bs + 1]              0, then running sums of L
    seqlens_expanded    [rows]                max(L - q + 1 + j, 0)
    nsa_cache_seqlens   [rows]                min(seqlens_expanded, index_topk)
    nsa_cu_seqlens_k    [rows + 1]            0, then running sums of nsa_cache_seqlens
    ctx_lens            [rows] or [rows, 1]   seqlens_expanded
    ctx_lens            [bs, q], q > 1        L in each column: the fill is *by request*
    page_table_1        [rows, columns]       req_to_token[req_pool_indices[r], c] for c < L
    real_page_table     [rows, pages]         req_to_token[..., p * page] // page for p * page < L
    row_count           [1]                   rows in use: min(sum of q, rows)
    mqa_schedule        [P + 1, 2]            where each of P processors begins: row, segment of it
    =================== ===================== =====================================================

    Inputs, int32 or int64, any strides:
        seq_lens: [bs]. Only the low 32 bits count, as in SGLang's int32 metadata.
        length_offset: tokens that ``seq_lens`` does not count yet, 0 or more, the same number for every
            request. L is the low 32 bits of the sum, so it is negative from 2**31 on.
        extend_lens: the rows per request: one number (a *uniform* batch) or a tensor [bs] (a *ragged*
            batch), where negative values count as 0 and larger ones than 2**31 - 1 as 2**31 - 1.
        req_pool_indices: [bs], rows of ``req_to_token``.
        req_to_token: [pool, tokens], the KV slot of each token of each request, low 32 bits. Both may
            be None when no page table is asked for.
        index_topk: how many tokens sparse attention keeps, 1 or more. This and the other numbers may be
            NumPy integers; the object holds ints.
        page_size: ``page`` above, tokens in a page of ``real_page_table``, 1 or more.
        enabled: None, or int32 [1]. A fill that reads 0 there writes nothing. The device reads it, so a
            captured fill can be switched off without a new capture.

    ``ctx_lens``, ``page_table_1``, ``real_page_table``, ``row_count`` and ``mqa_schedule`` are not
    filled when None. With page size 1 ``real_page_table`` must be None: it would equal
    ``page_table_1``. ``seqlens_expanded`` may be None when ``extend_lens`` is 1: in decode, SGLang uses
    ``cache_seqlens`` in its place.

    The three plans of SGLang's speculative step with n draft tokens are one fill with other numbers.
    The columns are ``seq_lens``, ``extend_lens`` and ``length_offset``:

    ============= =============================== === ===
    draft-decode  without this step's tokens        1   0
    target-verify without this step's tokens        n   n
    draft-extend  with the n tokens                 n   0
    ============= =============================== === ===

    ``mqa_schedule`` is DeepGEMM's schedule for paged MQA logits, for a uniform batch. Row t has
    ``ceil(seqlens_expanded[t] / 256)`` segments, of which all rows together have n. Processor p begins
    after the first ``p * (n // P) + min(p, n % P)`` segments; with ``mqa_remainder_last`` the last
    processors take the remainder, not the first: ``p * (n // P) + max(p - P + n % P, 0)``. The end of
    the segments is ``(rows, 0)``. Of a row at most ``256 * ((2**31 - 1) // rows)`` tokens count.

    By request, each of a request's q rows has the ``s = ceil(max(L, 0) / 256)`` segments of its last
    one, and the processor that takes a segment takes it of all q rows. So a processor that begins after
    the first b of a request's ``q * s`` segments has ``(first(r), b // q)`` in the schedule. This is
    what DeepGEMM does on SM100 where it is given [bs, q] lengths.

    Rows: a uniform batch has exactly ``bs * extend_lens`` rows. For a ragged batch the outputs decide
    how many there are: rows after those of the last request get length 0, and requests that do not fit
    are cut off. The device is never asked how many rows are in use.

    Edges: lengths are written as they come, even if negative or huge, and sums wrap like int32. Only
    table accesses are bounded, by the columns of the table and of ``req_to_token``. A request whose
    index lies outside the pool gets 0, SGLang's padding slot, in its live cells. Cells at and past L,
    and page-table rows after those of the last request, keep what they held.

    Raises:
        TypeError: a value is not a tensor or not a number, its dtype is wrong, or it is a fake tensor.
        ValueError: a device, rank, shape, stride or value is wrong, or outputs overlap.
    """

    seq_lens: torch.Tensor
    req_pool_indices: torch.Tensor | None
    req_to_token: torch.Tensor | None
    extend_lens: int | torch.Tensor
    length_offset: int = 0
    index_topk: int
    page_size: int
    cache_seqlens: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqlens_expanded: torch.Tensor | None
    nsa_cache_seqlens: torch.Tensor
    nsa_cu_seqlens_k: torch.Tensor
    ctx_lens: torch.Tensor | None = None
    page_table_1: torch.Tensor | None = None
    real_page_table: torch.Tensor | None = None
    row_count: torch.Tensor | None = None
    mqa_schedule: torch.Tensor | None = None
    mqa_remainder_last: bool = False
    enabled: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _take_numbers(self)
        _validate_expanded(self)
        _validate_tensors(self)
        _validate_shapes(self)
        _validate_tables(self)
        _validate_schedule(self)
        validate_overlap(self)

    @classmethod
    def unvalidated(cls, **tensors: Any) -> FillArgs:
        """A FillArgs that skips validation, which takes ten times as long as binding and launching.

        For tensors that differ from those of a validated FillArgs in nothing but their addresses and
        values, and in the width of the page tables: kernels trust every rule above.
        """
        args = object.__new__(cls)
        vars(args).update(tensors)
        return args

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        return self.seq_lens.device

    @property
    def bs(self) -> int:
        """Number of requests."""
        return self.seq_lens.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows of the outputs."""
        return self.bs if self.seqlens_expanded is None else self.seqlens_expanded.shape[0]

    @property
    def is_by_request(self) -> bool:
        """Whether ``ctx_lens`` and ``mqa_schedule`` go by requests, not by rows."""
        return self.ctx_lens is not None and self.ctx_lens.dim() == 2 and self.ctx_lens.shape[1] > 1

    def inputs(self) -> dict[str, torch.Tensor]:
        """The input tensors that are not None, by name."""
        return present(self, INPUTS)

    def outputs(self) -> dict[str, torch.Tensor]:
        """The output tensors that are not None, by name."""
        return present(self, OUTPUTS)


INPUTS = ("seq_lens", "req_pool_indices", "req_to_token", "extend_lens", "enabled")
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
REQUIRED = ("seq_lens", "cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
RANKS = {
    "req_to_token": (2,),
    "page_table_1": (2,),
    "real_page_table": (2,),
    "mqa_schedule": (2,),
    "ctx_lens": (1, 2),
}


def present(args: object, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of these names that a fill has."""
    tensors = {name: getattr(args, name) for name in names}
    return {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def _take_numbers(args: FillArgs) -> None:
    """Validates the numbers and makes each a plain int: the compiled library takes nothing else."""
    numbers = {
        "index_topk": number("index_topk", args.index_topk, lowest=1),
        "page_size": number("page_size", args.page_size, lowest=1),
        "length_offset": number("length_offset", args.length_offset, lowest=0),
    }
    if not isinstance(args.extend_lens, torch.Tensor):
        numbers["extend_lens"] = number("extend_lens", args.extend_lens, lowest=0, or_tensor=True)
    vars(args).update(numbers)  # the dataclass is frozen
    validate_bool("mqa_remainder_last", args.mqa_remainder_last)


def number(name: str, value: Any, lowest: int, or_tensor: bool = False) -> int:
    """The number as an int. A tensor is refused: reading it would wait for the device."""
    wrong_type = TypeError(
        f"{name}: must be an int{' or a tensor' if or_tensor else ''}, got {_type_name(value)}"
    )
    # Older NumPys, as on Python 3.10, take their bool for an index, with a warning.
    if isinstance(value, (bool, torch.Tensor)) or _type_name(value) in ("numpy.bool", "numpy.bool_"):
        raise wrong_type
    try:
        as_int = operator.index(value)
    except TypeError:
        raise wrong_type from None
    if not lowest <= as_int <= INT32_MAX:
        raise ValueError(f"{name}: must lie in {lowest} .. {INT32_MAX}, got {as_int}")
    return as_int


def validate_bool(name: str, value: object) -> None:
    """Refuses what is neither True nor False: the compiled library takes nothing else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be a bool, got {_type_name(value)}")


def _type_name(value: object) -> str:
    """The type with its module, so that numpy.bool is not taken for bool."""
    kind = type(value)
    return (
        kind.__name__
        if kind.__module__ in ("builtins", "torch")
        else f"{kind.__module__}.{kind.__name__}"
    )


def _validate_expanded(args: FillArgs) -> None:
    has_one_row = isinstance(args.extend_lens, int) and args.extend_lens == 1
    if args.seqlens_expanded is None and not has_one_row:
        raise TypeError(
            "seqlens_expanded: must be a torch.Tensor when extend_lens is not 1, got NoneType"
        )


def _validate_tensors(args: FillArgs) -> None:
    validate_device(args.seq_lens)
    for name in (*INPUTS, *OUTPUTS):
        value = getattr(args, name)
        if value is None and name not in REQUIRED:
            continue
        if name == "extend_lens" and isinstance(value, int):
            continue
        dtypes = INDEX_DTYPES if name in INPUTS and name != "enabled" else (torch.int32,)
        validate_tensor(name, value, args.seq_lens, dtypes, RANKS.get(name, (1,)))


def validate_device(seq_lens: object) -> None:
    """Refuses tensors that are neither in host nor in CUDA memory; all are where this one is."""
    if isinstance(seq_lens, torch.Tensor) and seq_lens.device.type not in ("cpu", "cuda"):
        raise ValueError(f"seq_lens: must be a CPU or CUDA tensor, got one on {seq_lens.device}")


def validate_tensor(
    name: str,
    value: object,
    seq_lens: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    ranks: tuple[int, ...],
) -> None:
    """Refuses what is no strided tensor of these dtypes and ranks beside ``seq_lens``, the first one."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {_type_name(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense tensor, got one of layout {value.layout}")
    _validate_dtype(name, value, dtypes)
    _validate_rank(name, value, ranks)
    if value.device != seq_lens.device:
        raise ValueError(
            f"{name}: must be on {seq_lens.device} like seq_lens, got a tensor on {value.device}"
        )
    _validate_memory(name, value)


def _validate_memory(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor without memory: fake, traced, batched by vmap, or its storage was freed."""
    rule = f"{name}: must be a tensor with memory of its own"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{rule}, got a {type(tensor).__name__}")
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # inside torch.func and torch.vmap
        raise TypeError(f"{rule}, got one inside a torch.func transform") from None
    if address == 0 and tensor.numel() > 0:
        raise ValueError(f"{rule}, got one whose address is 0")


def _validate_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        rule = " or ".join(_dtype_name(dtype) for dtype in allowed)
        raise TypeError(f"{name}: dtype must be {rule}, got {_dtype_name(tensor.dtype)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _validate_rank(name: str, tensor: torch.Tensor, ranks: tuple[int, ...]) -> None:
    if tensor.dim() not in ranks:
        rule = " or ".join(map(str, ranks))
        raise ValueError(
            f"{name}: must have {rule} dimension{'s' if ranks[-1] > 1 else ''}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if max(tensor.shape) > INT32_MAX:
        raise ValueError(f"{name}: sizes must lie below 2**31, got shape {tuple(tensor.shape)}")


def _validate_shapes(args: FillArgs) -> None:
    bs, rows = args.bs, args.rows
    if isinstance(args.extend_lens, int) and rows != bs * args.extend_lens:
        raise ValueError(
            f"seqlens_expanded: shape must be ({bs * args.extend_lens},) for {bs} requests of "
            f"{args.extend_lens} rows each, got ({rows},)"
        )
    for name, size in {
        "req_pool_indices": bs,
        "extend_lens": bs,
        "cache_seqlens": bs,
        "cu_seqlens_k": bs + 1,
        "nsa_cache_seqlens": rows,
        "nsa_cu_seqlens_k": rows + 1,
        "row_count": 1,
        "enabled": 1,
    }.items():
        validate_shape(name, getattr(args, name), (size,), f"bs={bs}, rows={rows}")
    _validate_ctx_lens(args)


def _validate_ctx_lens(args: FillArgs) -> None:
    if args.ctx_lens is None:
        return
    shapes = [(args.rows,) if args.ctx_lens.dim() == 1 else (args.rows, 1)]
    if args.ctx_lens.dim() == 2 and isinstance(args.extend_lens, int) and args.extend_lens > 1:
        shapes.append((args.bs, args.extend_lens))
    if tuple(args.ctx_lens.shape) not in shapes:
        raise ValueError(
            f"ctx_lens: shape must be {' or '.join(map(str, shapes))} for bs={args.bs}, "
            f"rows={args.rows}, got {tuple(args.ctx_lens.shape)}"
        )


def validate_shape(name: str, value: object, shape: tuple[int, ...], sizes: str) -> None:
    """Refuses a tensor of another shape; ``sizes`` says what the shape follows from."""
    if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} for {sizes}, got {tuple(value.shape)}")


def _validate_tables(args: FillArgs) -> None:
    tables = present(args, ("page_table_1", "real_page_table"))
    if "real_page_table" in tables and args.page_size == 1:
        raise ValueError(
            "real_page_table: must be None when page_size is 1: it would equal page_table_1"
        )
    for name, table in tables.items():
        if table.shape[0] != args.rows:
            raise ValueError(
                f"{name}: must have {args.rows} rows like seqlens_expanded, "
                f"got shape {tuple(table.shape)}"
            )
        for source in ("req_pool_indices", "req_to_token"):
            if getattr(args, source) is None:
                raise TypeError(f"{source}: must be a torch.Tensor when {name} is given, got NoneType")


def _validate_schedule(args: FillArgs) -> None:
    if args.mqa_schedule is None:
        return
    validate_schedule_shape("mqa_schedule", args.mqa_schedule)
    if isinstance(args.extend_lens, torch.Tensor):
        raise TypeError("mqa_schedule: must be None when extend_lens is a tensor")


def validate_schedule_shape(name: str, schedule: torch.Tensor) -> None:
    """Refuses a schedule that is not of one processor or more, with a line for the end."""
    if schedule.shape[0] < 2 or schedule.shape[1] != 2:
        raise ValueError(
            f"{name}: must have shape (P + 1, 2) for P processors, 1 or more, "
            f"got {tuple(schedule.shape)}"
        )


def longest_row(rows: int) -> int:
    """Tokens of a row that count in a schedule of ``rows`` rows: n stays below 2**31."""
    return min(INT32_MAX // max(rows, 1) * SEGMENT, INT32_MAX)


class Tensors(Protocol):
    """Arguments that name their tensors."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """The input tensors that are not None, by name."""

    def outputs(self) -> dict[str, torch.Tensor]:
        """The output tensors that are not None, by name."""


def validate_overlap(args: Tensors) -> None:
    """Refuses two outputs, or an output and an input, that share memory."""
    outputs = {name: t for name, t in args.outputs().items() if t.numel() > 0}
    for name, tensor in outputs.items():
        _validate_strides(name, tensor)
    ranges = {name: _byte_range(tensor) for name, tensor in outputs.items()}
    inputs = {name: _byte_range(t) for name, t in args.inputs().items() if t.numel() > 0}
    others: Iterator[tuple[str, str, tuple[int, int]]] = itertools.chain(
        ((a, b, ranges[b]) for a, b in itertools.combinations(ranges, 2)),
        ((a, b, inputs[b]) for a in ranges for b in inputs),
    )
    for name, other, (start, end) in others:
        first, last = ranges[name]
        if first < end and start < last:
            raise ValueError(
                f"{name}: must not overlap {other} in memory, got bytes "
                f"[{first:#x}, {last:#x}) and [{start:#x}, {end:#x})"
            )


def _validate_strides(name: str, tensor: torch.Tensor) -> None:
    """Refuses an output whose cells share memory, or whose rows do not follow one another."""
    extent = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name}: cells must not share memory, and each row must begin after the one before it, "
                f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        extent += (size - 1) * stride


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of the first byte and that after the last one. Strides in torch are never negative."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (span + 1) * tensor.element_size()
