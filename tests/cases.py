"""Fills in guarded memory, and the values that each must write, computed row by row in Python."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_nsa_plugin import FillArgs

CPU = torch.device("cpu")
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
GUARD = -1_431_655_766  # bits 1010...: no fill writes it and no case holds it
POISON = -123_456_789
EDGE = 256  # guard cells before and after every tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the cells of a tensor lie in its memory, counted in elements."""

    offset: int = 0  # 1 to 3: no cell begins a 16-byte vector of the allocation
    step: int = 1  # from one cell of a row to the next; 0, only of an input: all are one cell
    gap: int = 8  # guard cells between two rows; negative, only of an input: rows share cells
    transposed: bool = False  # two cells of a column are neighbours, not two of a row


DENSE = Layout(gap=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fill in plain numbers. ``dtypes`` and ``layouts`` go by the names of FillArgs."""

    seq_lens: Sequence[int]
    length_offset: int = 0
    extend_lens: int | Sequence[int] = 1
    indices: Sequence[int] | None = None  # None: request r uses row r modulo pool
    pool: int = 5
    tokens: int = 48
    index_topk: int = 20
    page_size: int = 1
    width: int | None = None  # columns of page_table_1
    pages: int | None = None  # columns of real_page_table
    rows: int | None = None  # of a ragged batch; None: as many as it needs
    expanded: bool = True  # whether seqlens_expanded is filled
    ctx_dims: int = 0
    by_request: bool = False  # whether ctx_lens is [bs, q], whatever ctx_dims is
    row_count: bool = False
    processors: int | None = None  # of mqa_schedule
    remainder_last: bool = False
    enabled: int | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)  # an input that is another input's tensor

    @property
    def bs(self) -> int:
        return len(self.seq_lens)

    def output_rows(self) -> int:
        if isinstance(self.extend_lens, int):
            return self.bs * self.extend_lens
        return sum(max(q, 0) for q in self.extend_lens) if self.rows is None else self.rows

    def slots(self) -> np.ndarray:
        """What req_to_token holds: no two cells alike, with the ends of int32 and of division."""
        slots = np.random.default_rng(7).integers(0, 2**31, (self.pool, self.tokens))
        slots.flat[::11] = -1 - np.arange(len(slots.flat[::11])) % 70
        slots.flat[5::97] = INT32_MIN
        slots.flat[3::89] += 2**35  # of which int64 keeps the low 32 bits, as int32 does
        return slots

    def input_values(self) -> dict[str, np.ndarray]:
        values = {"seq_lens": np.array(self.seq_lens, np.int64)}
        if not isinstance(self.extend_lens, int):
            values["extend_lens"] = np.array(self.extend_lens, np.int64)
        if self.width is not None or self.pages is not None:
            indices = self.indices
            if indices is None:
                indices = [r % max(self.pool, 1) for r in range(self.bs)]
            values["req_pool_indices"] = np.array(indices, np.int64)
            values["req_to_token"] = self.slots()
        if self.enabled is not None:
            values["enabled"] = np.array([self.enabled], np.int64)
        return values

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        bs, rows = self.bs, self.output_rows()
        shapes: dict[str, tuple[int, ...]] = {
            "cache_seqlens": (bs,),
            "cu_seqlens_k": (bs + 1,),
            "nsa_cache_seqlens": (rows,),
            "nsa_cu_seqlens_k": (rows + 1,),
        }
        if self.expanded:
            shapes["seqlens_expanded"] = (rows,)
        if self.by_request and isinstance(self.extend_lens, int):
            shapes["ctx_lens"] = (bs, self.extend_lens)
        elif self.ctx_dims:
            shapes["ctx_lens"] = (rows,) if self.ctx_dims == 1 else (rows, 1)
        if self.width is not None:
            shapes["page_table_1"] = (rows, self.width)
        if self.pages is not None:
            shapes["real_page_table"] = (rows, self.pages)
        if self.row_count:
            shapes["row_count"] = (1,)
        if self.processors is not None:
            shapes["mqa_schedule"] = (self.processors + 1, 2)
        return shapes


class Guarded:
    """A case laid out in memory: each tensor in a buffer of its own, among guard cells.

    :meth:`check` compares whole buffers, so a write outside a tensor, into the gaps of a strided
    one or into an input is found wherever it lands in a buffer.
    """

    def __init__(self, case: Case, device: torch.device = CPU) -> None:
        self.memory: dict[str, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, values in case.input_values().items():
            dtype = case.dtypes.get(name, torch.int32 if name == "enabled" else torch.int64)
            layout = case.layouts.get(name, Layout())
            self.memory[name], tensors[name] = place(values, dtype, device, layout)
        for name in case.shared.keys() & tensors.keys():
            tensors[name] = tensors.get(case.shared[name], tensors[name])
        for name, shape in case.output_shapes().items():
            layout = case.layouts.get(name, Layout())
            values = np.full(shape, POISON)
            self.memory[name], tensors[name] = place(values, torch.int32, device, layout)
        if isinstance(case.extend_lens, int):
            self.args = fill_args(case, extend_lens=case.extend_lens, **tensors)
        else:
            self.args = fill_args(case, **tensors)

    def poison(self) -> None:
        for tensor in self.args.outputs().values():
            tensor.fill_(POISON)

    def expected(self) -> dict[str, torch.Tensor]:
        """Every buffer as a fill of the present inputs must leave it."""
        memory = {name: buffer.clone() for name, buffer in self.memory.items()}
        for name, values in self.expected_values().items():
            _like(memory[name], self.args.outputs()[name]).copy_(torch.from_numpy(values))
        return memory

    def expected_values(self) -> dict[str, np.ndarray]:
        return expect(self.args)

    def compare(self, expected: Mapping[str, torch.Tensor]) -> None:
        tensors = self.args.inputs() | self.args.outputs()
        for name, buffer in self.memory.items():
            if not torch.equal(buffer, expected[name]):
                raise AssertionError(_difference(name, buffer, expected[name], tensors[name]))

    def check(self, run: Callable[[FillArgs], object]) -> None:
        """Runs a fill and compares every buffer."""
        expected = self.expected()
        run(self.args)
        self.compare(expected)


def fill_args(case: Case, **tensors: object) -> FillArgs:
    """The FillArgs of a case from its tensors by name."""
    may_be_none = ("req_pool_indices", "req_to_token", "seqlens_expanded")
    given: dict[str, object] = {**dict.fromkeys(may_be_none), **tensors}
    numbers = {
        "length_offset": case.length_offset,
        "index_topk": case.index_topk,
        "page_size": case.page_size,
        "mqa_remainder_last": case.remainder_last,
    }
    return FillArgs(**numbers, **given)  # type: ignore[arg-type]


def place(
    values: np.ndarray, dtype: torch.dtype, device: torch.device, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer full of guard cells, and the view of it that holds ``values``."""
    strides = _strides(values.shape, layout)
    span = sum(max(n - 1, 0) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
    memory = torch.full((EDGE + layout.offset + span + EDGE,), GUARD, dtype=dtype, device=device)
    view = memory.as_strided(values.shape, strides, EDGE + layout.offset)
    # torch copies to no stride of 0: of cells that are one, the first is written
    cells = tuple(slice(n if stride else 1) for n, stride in zip(values.shape, strides, strict=True))
    view[cells].copy_(torch.from_numpy(values[cells]))
    return memory, view


def _strides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if len(shape) == 1:
        return (layout.step,)
    rows, columns = shape
    neighbours = rows if layout.transposed else columns
    far = max((neighbours - 1) * layout.step + 1 + layout.gap, 0)
    return (layout.step, far) if layout.transposed else (far, layout.step)


def _like(memory: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(view.shape, view.stride(), view.storage_offset())


def _difference(name: str, actual: torch.Tensor, expected: torch.Tensor, tensor: torch.Tensor) -> str:
    cells = (actual != expected).nonzero().flatten().tolist()
    cell = cells[0]
    elements = (_like(torch.arange(len(actual)), tensor) == cell).nonzero().tolist()
    where = f"element {tuple(elements[0])}" if elements else "outside the tensor"
    return (
        f"{name}, {where}: wrote {int(actual[cell])}, expected {int(expected[cell])} "
        f"({len(cells)} cells differ; shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    )


def expect(args: FillArgs) -> dict[str, np.ndarray]:
    """What each output must hold after a fill, by the contract's table, one row after the other."""
    out = {name: tensor.cpu().numpy().copy() for name, tensor in args.outputs().items()}
    if args.enabled is not None and int(args.enabled) == 0:
        return out
    row = sum_of_lengths = sum_of_clamped = 0
    by_request = "ctx_lens" in out and out["ctx_lens"].ndim == 2 and out["ctx_lens"].shape[1] > 1
    lengths_of_rows: list[int] = []
    out["cu_seqlens_k"][0] = out["nsa_cu_seqlens_k"][0] = 0
    for r, (length, q) in enumerate(_requests(args)):
        out["cache_seqlens"][r] = length
        sum_of_lengths += length
        out["cu_seqlens_k"][r + 1] = to_int32(sum_of_lengths)
        slots = _slots_of(args, r)
        for j in range(min(q, args.rows - row)):
            expanded = max(length - q + 1 + j, 0)
            sum_of_clamped += min(expanded, args.index_topk)
            _set_row(out, row, expanded, args.index_topk, sum_of_clamped)
            if by_request:
                out["ctx_lens"][r, j] = length
            elif "ctx_lens" in out:
                out["ctx_lens"][row] = expanded
            lengths_of_rows.append(max(length, 0) if by_request else expanded)
            _copy_pages(out.get("page_table_1"), row, slots, length, 1)
            _copy_pages(out.get("real_page_table"), row, slots, length, args.page_size)
            row += 1
    if "row_count" in out:
        out["row_count"][0] = row
    for rest in range(row, args.rows):
        _set_row(out, rest, 0, args.index_topk, sum_of_clamped)
        if "ctx_lens" in out:
            out["ctx_lens"][rest] = 0
    if "mqa_schedule" in out:
        together = args.extend_lens if by_request else 1
        assert isinstance(together, int)
        _set_schedule(out["mqa_schedule"], lengths_of_rows, args.mqa_remainder_last, together)
    return out


def _set_schedule(
    schedule: np.ndarray, lengths: Sequence[int], remainder_last: bool, together: int
) -> None:
    """Deals the segments out one by one: each processor is given its share, and begins at its first.

    ``together`` neighbouring rows of one length are dealt out side by side: first segment 0 of each of
    them, then segment 1. A processor that begins amid them begins with the segment anew.
    """
    rows = len(lengths)
    longest = (2**31 - 1) // max(rows, 1) * 256
    segments = [-(-min(length, longest) // 256) for length in lengths]
    processors = len(schedule) - 1
    share, longer = divmod(sum(segments), processors)
    row = segment = 0
    for p in range(processors + 1):
        while row < rows and segment >= together * segments[row]:
            segment -= together * segments[row]
            row += together
        schedule[p] = (row, segment // together if row < rows else 0)
        takes_more = p >= processors - longer if remainder_last else p < longer
        segment += share + takes_more


def to_int32(value: int) -> int:
    """The low 32 bits as a signed number."""
    return (value + 2**31) % 2**32 - 2**31


def _requests(args: FillArgs) -> list[tuple[int, int]]:
    lengths = [to_int32(seq_len + args.length_offset) for seq_len in args.seq_lens.tolist()]
    if isinstance(args.extend_lens, int):
        return [(length, args.extend_lens) for length in lengths]
    rows_per_request = [min(max(q, 0), INT32_MAX) for q in args.extend_lens.tolist()]
    return list(zip(lengths, rows_per_request, strict=True))


def _set_row(out: dict[str, np.ndarray], row: int, expanded: int, topk: int, sums: int) -> None:
    out["nsa_cache_seqlens"][row] = min(expanded, topk)
    out["nsa_cu_seqlens_k"][row + 1] = to_int32(sums)
    if "seqlens_expanded" in out:
        out["seqlens_expanded"][row] = expanded


def _slots_of(args: FillArgs, r: int) -> np.ndarray:
    if args.req_to_token is None or args.req_pool_indices is None:
        return np.zeros(0, np.int64)
    pool, tokens = args.req_to_token.shape
    index = int(args.req_pool_indices[r])
    if not 0 <= index < pool:
        return np.zeros(tokens, np.int64)
    return args.req_to_token[index].cpu().numpy().astype(np.int32)


def _copy_pages(table: np.ndarray | None, row: int, slots: np.ndarray, length: int, page: int) -> None:
    if table is None:
        return
    first_slots = slots[: max(length, 0)][::page][: table.shape[1]]
    table[row, : len(first_slots)] = first_slots // page


@dataclass(frozen=True)
class Backend:
    """An implementation on a device, taken from its module without dispatch."""

    device: torch.device
    name: str

    def __str__(self) -> str:
        return f"{self.device.type}:{self.name}"

    @property
    def interpreted(self) -> bool:
        return str(self) == "cpu:triton"

    def bind(self, args: FillArgs) -> Callable[[], None]:
        module = importlib.import_module(f"sglang_nsa_plugin.kernels.{self.name}")
        run: Callable[[], None] = module.bind(args)
        return run

    def fill(self, args: FillArgs) -> None:
        self.bind(args)()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check(self, case: Case) -> Guarded:
        """Fills the case and compares all of its memory."""
        guarded = Guarded(case, self.device)
        guarded.check(self.fill)
        return guarded


def vast_vector(device: torch.device) -> torch.Tensor:
    """Zeros, 2**31 and a few on either side of the middle, 17 GB.

    On the CPU they take memory only where they are touched. An offset from the middle that
    overflows int32 lands at the beginning, where a test finds it, and not in a fault.
    """
    elements = 2**32 + 4096
    if device.type == "cuda":
        return torch.zeros(elements, dtype=torch.int32, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 4 * elements, flags=flags), dtype=torch.int32)
