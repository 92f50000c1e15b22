"""Random k-pooling fills in guarded memory, and what each must write, computed row by row in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from cases import CPU, INT32_MAX, INT32_MIN, POISON, Guarded, Layout, place, to_int32
from random_cases import ends, happens, near

from sglang_nsa_plugin.kpool_args import INT64_OUTPUTS, KPoolArgs

INDEX_INPUTS = ("seq_lens", "req_pool_indices", "req_to_token", "accept_lens")
LEFT_OUT = ("row_seqlens", "kpool_page_table", "kpool_schedule", "write_counts")
SEGMENT = 256  # k-pools
# What fills more than one block of the CUDA kernel: rows of requests, and pages of one request.
MANY = 257
MANY_PAGES = (256, 257, 600)


@dataclass(frozen=True)
class KPoolCase:
    """One fill in plain numbers. ``dtypes`` and ``layouts`` go by the names of KPoolArgs."""

    inputs: Mapping[str, Any]
    numbers: Mapping[str, Any]
    outputs: Mapping[str, tuple[int, ...]]  # shapes of those that are not left out
    dtypes: Mapping[str, torch.dtype]
    layouts: Mapping[str, Layout]


class GuardedKPool(Guarded):
    """The tensors of a case, each in a buffer of its own, among guard cells."""

    def __init__(self, case: KPoolCase, device: torch.device = CPU) -> None:
        self.memory = {}
        tensors = {}
        for name, values in case.inputs.items():
            layout, dtype = case.layouts.get(name, Layout()), case.dtypes.get(name, torch.int32)
            self.memory[name], tensors[name] = place(np.array(values), dtype, device, layout)
        for name, shape in case.outputs.items():
            layout = case.layouts.get(name, Layout())
            dtype = torch.int64 if name in INT64_OUTPUTS else torch.int32
            self.memory[name], tensors[name] = place(np.full(shape, POISON), dtype, device, layout)
        self.args: Any = KPoolArgs(**case.numbers, **tensors)

    def expected_values(self) -> dict[str, np.ndarray]:
        return expect(self.args)


def check(case: KPoolCase, fill: Callable[[KPoolArgs], object], device: torch.device = CPU) -> None:
    GuardedKPool(case, device).check(fill)


def expect(args: KPoolArgs) -> dict[str, np.ndarray]:
    """What each output must hold after a fill, by the contract's table, one row after the other."""
    out = {name: each.cpu().numpy().copy() for name, each in args.outputs().items()}
    if args.enabled is not None and int(args.enabled) == 0:
        return out
    n, k, sums = args.extend_lens, args.index_kpool, 0
    kpools_of_rows: list[int] = []
    out["nsa_cu_seqlens_k"][0] = 0
    for r, seq_len in enumerate(args.seq_lens.tolist()):
        length = to_int32(seq_len + args.length_offset)
        start = to_int32(length - n)
        out["write_requests"][r] = int(args.req_pool_indices[r])
        out["write_start"][r], out["tail_start"][r] = start, divide(start, k) * k
        if "write_counts" in out:
            out["write_counts"][r] = to_int32(int(args.accept_lens[r]))
        pages = pages_of(args, r, length)
        set_locs(out["write_locs"][r], divide(start, k), pages, args.page_size)
        for j in range(n):
            row, seen = r * n + j, max(length - n + 1 + j, 0)
            kept = min(seen // k * k, args.index_topk) + seen % k
            sums += kept
            out["nsa_cache_seqlens"][row] = kept
            out["nsa_cu_seqlens_k"][row + 1] = to_int32(sums)
            row_seqlen = to_int32(start + 1 + j)
            out["kpool_seqlens"][row] = divide(row_seqlen, k)
            kpools_of_rows.append(divide(row_seqlen, k))
            if "row_seqlens" in out:
                out["row_seqlens"][row] = row_seqlen
            if "kpool_page_table" in out:
                cells = out["kpool_page_table"][row]
                cells[: len(pages)] = pages[: len(cells)]
    if "kpool_schedule" in out:
        set_schedule(out["kpool_schedule"], kpools_of_rows, args.mqa_remainder_last)
    return out


def divide(value: int, divisor: int) -> int:
    """Rounds toward 0."""
    return value // divisor if value >= 0 else -(-value // divisor)


def set_locs(locs: np.ndarray, first: int, pages: list[int], page_size: int) -> None:
    for p in range(len(locs)):
        page = divide(first + p, page_size)
        if max(page, 0) < len(pages):
            locs[p] = pages[max(page, 0)] * page_size + (first + p - page * page_size)


def pages_of(args: KPoolArgs, r: int, length: int) -> list[int]:
    """The live pages of a request."""
    pool, tokens = args.req_to_token.shape
    index = int(args.req_pool_indices[r])
    first_tokens = range(0, min(max(length, 0), tokens), args.page_size * args.index_kpool)
    if not 0 <= index < pool:
        return [0 for _ in first_tokens]
    slots = args.req_to_token[index]
    return [to_int32(int(slots[token])) // args.server_page_size for token in first_tokens]


def set_schedule(schedule: np.ndarray, kpools: list[int], remainder_last: bool) -> None:
    """Deals out the segments, of which each row has at least one."""
    rows, processors = len(kpools), len(schedule) - 1
    longest = INT32_MAX // max(rows, 1) * SEGMENT
    segments = [-(-min(max(count, 1), longest) // SEGMENT) for count in kpools]
    share, longer = divmod(sum(segments), processors)
    row = segment = 0
    for p in range(processors + 1):
        while row < rows and segment >= segments[row]:
            segment -= segments[row]
            row += 1
        schedule[p] = (row, segment if row < rows else 0)
        segment += share + (p >= processors - longer if remainder_last else p < longer)


def random_case(rng: Random) -> KPoolCase:
    """Any fill that KPoolArgs takes: most lengths lie around multiples of k and of the pages."""
    k, n = rng.choice([2, 3, 4, 8, 16, 64]), rng.choice([1, 2, 3, 4, 6, 9, 17])
    bs = rng.randint(0, 5) if happens(rng, 0.99) else MANY
    page_size = k * rng.choice([1, 1, 2, 5])
    page_tokens = page_size * k
    topk = k * rng.choice([1, 3, 16, INT32_MAX // k])
    pool, pages = rng.randint(0, 4), rng.choice([0, 1, 3])
    if page_tokens <= 64 and happens(rng, 0.05):
        pages = rng.choice(MANY_PAGES)
    tokens = max(near(rng, pages * page_tokens), 0)
    dtypes = {name: rng.choice((torch.int32, torch.int64)) for name in INDEX_INPUTS}
    offset = rng.choice([0, n, n, 1, near(rng, INT32_MAX)])
    edges = (0, n, k, page_size, page_tokens, tokens, topk, topk + k, k * rng.randint(0, 3 * page_size))
    numbers = {
        "extend_lens": n,
        "length_offset": offset,
        "index_kpool": k,
        "index_topk": topk,
        "page_size": page_size,
        "server_page_size": rng.choice([page_size, page_tokens]),
        "mqa_remainder_last": happens(rng, 0.5),
    }
    inputs: dict[str, Any] = {
        "seq_lens": [random_length(rng, edges, n, offset, dtypes["seq_lens"]) for _ in range(bs)],
        "req_pool_indices": [random_index(rng, pool, dtypes["req_pool_indices"]) for _ in range(bs)],
        "req_to_token": random_slots(rng, pool, tokens, dtypes["req_to_token"]),
        "accept_lens": [random_index(rng, n, dtypes["accept_lens"]) for _ in range(bs)],
    }
    if happens(rng, 0.2):
        inputs["enabled"] = [rng.choice([0, 1, -1])]
    outputs = output_shapes(rng, bs, n, k, -(-tokens // page_tokens))
    if "write_counts" not in outputs:
        del inputs["accept_lens"]
    return KPoolCase(inputs, numbers, outputs, dtypes, random_layouts(rng, [*inputs, *outputs]))


def random_length(rng: Random, edges: tuple[int, ...], n: int, offset: int, dtype: torch.dtype) -> int:
    if happens(rng, 0.1):
        return ends(rng, dtype)
    length = rng.choice(edges) + rng.randint(-n - 1, n + 1) - (offset if happens(rng, 0.8) else 0)
    return to_int32(length)


def random_index(rng: Random, most: int, dtype: torch.dtype) -> int:
    return rng.randint(-1, most) if happens(rng, 0.9) else ends(rng, dtype)


def random_slots(rng: Random, pool: int, tokens: int, dtype: torch.dtype) -> np.ndarray:
    """Also negative ones, the ends of int32, and in int64 ones of more than 32 bits."""
    bits = 35 if dtype == torch.int64 else 31
    slots = np.random.default_rng(rng.randrange(2**32)).integers(-(2**bits), 2**bits, (pool, tokens))
    slots[:, :: rng.randint(2, 5)] = rng.choice([0, INT32_MIN, INT32_MIN + 70, INT32_MAX])
    return slots


def shapes_of(bs: int, n: int, k: int, pages: int, processors: int) -> dict[str, tuple[int, ...]]:
    """Of every output."""
    rows = bs * n
    return {
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "write_requests": (bs,),
        "write_start": (bs,),
        "tail_start": (bs,),
        "write_locs": (bs, -(-n // k)),
        "write_counts": (bs,),
        "row_seqlens": (rows,),
        "kpool_seqlens": (rows,),
        "kpool_page_table": (rows, pages),
        "kpool_schedule": (processors + 1, 2),
    }


def output_shapes(rng: Random, bs: int, n: int, k: int, pages: int) -> dict[str, tuple[int, ...]]:
    columns = max(near(rng, pages, pages + 2), 0)
    shapes = shapes_of(bs, n, k, columns, rng.choice([1, 2, 78, 132, 300]))
    left_out = [name for name in LEFT_OUT if happens(rng, 0.2)]
    return {name: shape for name, shape in shapes.items() if name not in left_out}


def random_layouts(rng: Random, names: list[str]) -> dict[str, Layout]:
    """Of an input, cells may also share memory."""
    layouts = {}
    for name in names:
        is_input = name in INDEX_INPUTS
        layouts[name] = Layout(
            offset=rng.randint(0, 3),
            step=rng.choice((1, 1, 2, 3, 0) if is_input else (1, 1, 2, 3)),
            gap=rng.randint(-2 if is_input else 0, 5),
            transposed=name == "req_to_token" and happens(rng, 0.3),
        )
    return layouts
