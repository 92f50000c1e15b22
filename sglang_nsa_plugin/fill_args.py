"""The contract of a draft-extend metadata fill: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

INT32_MAX = 2**31 - 1
INDEX_DTYPES = (torch.int32, torch.int64)
SEGMENT = 256  # tokens in a segment of DeepGEMM's schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class FillArgs:
    """The tensors of one fill, checked when the object is made.

    Request r of ``bs`` has ``L = seq_lens[r]`` tokens in the KV cache, of which the last
    ``q = extend_lens[r]`` are the rows ``t = first(r) + j, 0 <= j < q`` of this forward, where
    ``first(r)`` is the sum of q over the requests before r. A fill writes, all int32:

    =================== ===================== =====================================================
    cache_seqlens       [bs]                  L
    cu_seqlens_k        [bs + 1]              0, then running sums of L
    seqlens_expanded    [rows]                max(L - q + 1 + j, 0)
    nsa_cache_seqlens   [rows]                min(seqlens_expanded, index_topk)
    nsa_cu_seqlens_k    [rows + 1]            0, then running sums of nsa_cache_seqlens
    ctx_lens            [rows] or [rows, 1]   seqlens_expanded
    page_table_1        [rows, width]         req_to_token[req_pool_indices[r], c] for c < L
    real_page_table     [rows, width / page]  req_to_token[..., p * page] // page for p * page < L
    row_count           [1]                   rows in use: min(sum of q, rows)
    mqa_schedule        [P + 1, 2]            where each of P processors begins: row, segment of it
    =================== ===================== =====================================================

    Inputs, int32 or int64, any strides:
        seq_lens: [bs]. Only the low 32 bits count, as in SGLang's int32 metadata.
        extend_lens: a number, the same for every request, or [bs]. Negative counts as 0, more than
            2**31 - 1 as that.
        req_pool_indices: [bs], rows of ``req_to_token``.
        req_to_token: [pool, columns], the KV slot of each token of each request, low 32 bits. Both
            may be None when no page table is asked for.
        index_topk: how many tokens sparse attention keeps, 1 or more.
        page_size: tokens in a page of ``real_page_table``, 1 or more.
        enabled: None, or int32 [1]: a fill that finds 0 there writes nothing. It is read on the
            device, so a captured fill can be switched off without a new capture.

    ``ctx_lens``, ``page_table_1``, ``real_page_table``, ``row_count`` and ``mqa_schedule`` are left out
    when None. With page size 1 there is no ``real_page_table``: it would be ``page_table_1``.

    ``mqa_schedule`` is DeepGEMM's for paged MQA logits. Row t has ``ceil(seqlens_expanded[t] / 256)``
    segments, n are there in all, and processor p begins behind the first
    ``p * (n // P) + min(p, n % P)`` of them; with ``mqa_remainder_last`` the last processors take what
    does not divide evenly, not the first: ``p * (n // P) + max(p - P + n % P, 0)``. At the end of the
    segments stands ``(rows, 0)``. Rows longer than ``256 * ((2**31 - 1) // rows)`` count as that long.
    It needs a number in ``extend_lens``.

    Rows: a number in ``extend_lens`` asks for exactly ``bs * extend_lens`` rows. With a tensor the
    outputs say how many rows there are; rows behind the last request get length 0 and requests that
    do not fit are cut off. How many are in use is never asked of the device.

    Edges: lengths are written as they come, also negative or huge ones, and sums wrap like int32; only
    table accesses are bounded, by the table's width and by that of ``req_to_token``. A request index
    outside the pool fills its live cells with 0, SGLang's padding slot. Cells at and past L, and the
    page-table cells of rows behind the last request, keep what they held.

    Raises:
        TypeError: something is not a tensor or not a number, or has a dtype that a fill does not take.
        ValueError: wrong device, rank, shape, stride or value, or outputs that overlap.
    """

    seq_lens: torch.Tensor
    req_pool_indices: torch.Tensor | None
    req_to_token: torch.Tensor | None
    extend_lens: int | torch.Tensor
    index_topk: int
    page_size: int
    cache_seqlens: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqlens_expanded: torch.Tensor
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
        _check_numbers(self)
        _check_tensors(self)
        _check_shapes(self)
        _check_tables(self)
        _check_schedule(self)
        _check_overlap(self)

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
        """Where every tensor lies."""
        return self.seq_lens.device

    @property
    def bs(self) -> int:
        """Number of requests."""
        return self.seq_lens.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows of the outputs."""
        return self.seqlens_expanded.shape[0]

    def inputs(self) -> dict[str, torch.Tensor]:
        """The input tensors that are there, by name."""
        return _present(self, INPUTS)

    def outputs(self) -> dict[str, torch.Tensor]:
        """The output tensors that are there, by name."""
        return _present(self, OUTPUTS)


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
REQUIRED = ("seq_lens", *OUTPUTS[:5])
RANKS = {
    "req_to_token": (2,),
    "page_table_1": (2,),
    "real_page_table": (2,),
    "mqa_schedule": (2,),
    "ctx_lens": (1, 2),
}


def _present(args: FillArgs, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(args, name) for name in names}
    return {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def _check_numbers(args: FillArgs) -> None:
    for name in ("index_topk", "page_size"):
        _check_number(name, getattr(args, name), lowest=1)
    if not isinstance(args.extend_lens, torch.Tensor):
        _check_number("extend_lens", args.extend_lens, lowest=0, otherwise=" or a tensor")


def _check_number(name: str, value: object, lowest: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an int{otherwise}, got {type(value).__name__}")
    if not lowest <= value <= INT32_MAX:
        raise ValueError(f"{name}: must lie in {lowest} .. {INT32_MAX}, got {value}")


def _check_tensors(args: FillArgs) -> None:
    if isinstance(args.seq_lens, torch.Tensor) and args.device.type not in ("cpu", "cuda"):
        raise ValueError(f"seq_lens: must be a CPU or CUDA tensor, got one on {args.device}")
    for name in (*INPUTS, *OUTPUTS):
        value = getattr(args, name)
        if value is None and name not in REQUIRED:
            continue
        if name == "extend_lens" and isinstance(value, int):
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}: must be a dense tensor, got one of layout {value.layout}")
        _check_dtype(name, value)
        _check_rank(name, value)
        if value.device != args.device:
            raise ValueError(
                f"{name}: must be on {args.device} like seq_lens, got a tensor on {value.device}"
            )


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    allowed = INDEX_DTYPES if name in INPUTS and name != "enabled" else (torch.int32,)
    if tensor.dtype not in allowed:
        rule = " or ".join(_dtype_name(dtype) for dtype in allowed)
        raise TypeError(f"{name}: dtype must be {rule}, got {_dtype_name(tensor.dtype)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_rank(name: str, tensor: torch.Tensor) -> None:
    ranks = RANKS.get(name, (1,))
    if tensor.dim() not in ranks:
        rule = " or ".join(map(str, ranks))
        raise ValueError(
            f"{name}: must have {rule} dimension{'s' if ranks[-1] > 1 else ''}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if max(tensor.shape) > INT32_MAX:
        raise ValueError(f"{name}: sizes must lie below 2**31, got shape {tuple(tensor.shape)}")


def _check_shapes(args: FillArgs) -> None:
    bs, rows = args.bs, args.rows
    if isinstance(args.extend_lens, int) and rows != bs * args.extend_lens:
        raise ValueError(
            f"seqlens_expanded: {bs} requests of {args.extend_lens} rows each need shape "
            f"({bs * args.extend_lens},), got {tuple(args.seqlens_expanded.shape)}"
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
        _check_shape(name, getattr(args, name), (size,), f"bs={bs}, rows={rows}")
    if args.ctx_lens is not None:
        shape = (rows,) if args.ctx_lens.dim() == 1 else (rows, 1)
        _check_shape("ctx_lens", args.ctx_lens, shape, f"bs={bs}, rows={rows}")


def _check_shape(name: str, value: object, shape: tuple[int, ...], sizes: str) -> None:
    if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} for {sizes}, got {tuple(value.shape)}")


def _check_tables(args: FillArgs) -> None:
    tables = _present(args, ("page_table_1", "real_page_table"))
    if "real_page_table" in tables and args.page_size == 1:
        raise ValueError(
            "real_page_table: must be None when page_size is 1, where it would be page_table_1"
        )
    for name, table in tables.items():
        if table.shape[0] != args.rows:
            raise ValueError(
                f"{name}: must have {args.rows} rows like seqlens_expanded, "
                f"got shape {tuple(table.shape)}"
            )
        for source in ("req_pool_indices", "req_to_token"):
            if getattr(args, source) is None:
                raise TypeError(f"{source}: must be a torch.Tensor to fill {name}, got NoneType")


def _check_schedule(args: FillArgs) -> None:
    if args.mqa_schedule is None:
        return
    if args.mqa_schedule.shape[0] < 2 or args.mqa_schedule.shape[1] != 2:
        raise ValueError(
            "mqa_schedule: must have 2 columns and a row for each processor, one or more, and one "
            f"behind them, got shape {tuple(args.mqa_schedule.shape)}"
        )
    if isinstance(args.extend_lens, torch.Tensor):
        raise TypeError("mqa_schedule: needs an int in extend_lens, got a tensor")


def longest_row(rows: int) -> int:
    """Tokens of a row that count in a schedule: all segments together stay below 2**31."""
    return min(INT32_MAX // max(rows, 1) * SEGMENT, INT32_MAX)


def _check_overlap(args: FillArgs) -> None:
    """Writes of different threads must never meet, and no write may change an input."""
    outputs = {name: t for name, t in args.outputs().items() if t.numel() > 0}
    for name, tensor in outputs.items():
        _check_strides(name, tensor)
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


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    """Each cell of an output has an address of its own: rows lie behind one another."""
    extent = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name}: cells must not share memory and rows must follow one another, "
                f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        extent += (size - 1) * stride


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last one; strides are never negative in torch."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (span + 1) * tensor.element_size()
