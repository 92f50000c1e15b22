"""A k-pooling fill: both implementations against the contract's table, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from cases import POISON, to_int32

from sglang_nsa_plugin.kernels import kpool_compiled, kpool_torch
from sglang_nsa_plugin.kpool_args import KPoolArgs

PAGE = 64  # k-pools
PROCESSORS = 3
BATCHES = 300


def near(rng: Random, *edges: int) -> int:
    return rng.choice(edges) + rng.randint(-2, 2)


def random_args(rng: Random, requests: int | None = None, **changed: object) -> KPoolArgs:
    """A batch whose lengths lie around multiples of k and of the pages."""
    k, n = rng.choice([2, 4, 8, 16, 64]), rng.randint(1, 9)
    bs = rng.randint(0, 5) if requests is None else requests
    dtypes = (torch.int32, torch.int64)
    tokens, pool = max(near(rng, PAGE * k, 2 * PAGE * k, 3 * PAGE * k), 0), rng.randint(1, 4)
    tops = (0, n, k, PAGE, PAGE * k, tokens, k * rng.randint(0, 3 * PAGE), PAGE * rng.randint(0, 3 * k))
    rows = bs * n
    values: dict[str, object] = {
        "seq_lens": tensor([near(rng, *tops) for _ in range(bs)], rng.choice(dtypes)),
        "req_pool_indices": tensor([rng.randint(-1, pool) for _ in range(bs)], rng.choice(dtypes)),
        "req_to_token": torch.tensor(
            [[rng.randrange(2**31) for _ in range(tokens)] for _ in range(pool)], dtype=torch.int32
        ).view(pool, tokens),
        "extend_lens": n,
        "length_offset": rng.choice([0, n]),
        "accept_lens": tensor([rng.randint(0, n) for _ in range(bs)], rng.choice(dtypes)),
        "index_kpool": k,
        "index_topk": k * rng.choice([1, 3, PAGE]),
        "page_size": PAGE,
        "server_page_size": rng.choice([PAGE, PAGE * k]),
        "write_requests": poison(bs, dtype=torch.int64),
        "write_locs": poison(bs, -(-n // k), dtype=torch.int64),
        "nsa_cu_seqlens_k": poison(rows + 1),
        "kpool_page_table": poison(rows, max(near(rng, 2, tokens // (PAGE * k)), 0)),
        "kpool_schedule": poison(PROCESSORS + 1, 2),
        "mqa_remainder_last": rng.random() < 0.5,
        **{name: poison(bs) for name in ("write_start", "tail_start", "write_counts")},
        **{name: poison(rows) for name in ("nsa_cache_seqlens", "row_seqlens", "kpool_seqlens")},
    }
    return KPoolArgs(**{**values, **changed})  # type: ignore[arg-type]


def tensor(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


def divide(value: int, divisor: int) -> int:
    """Rounds toward 0."""
    return value // divisor if value >= 0 else -(-value // divisor)


def expect(args: KPoolArgs) -> dict[str, np.ndarray]:
    """What each output must hold after a fill, computed one row after the other."""
    out = {name: each.numpy().copy() for name, each in args.outputs().items()}
    n, k, sums = args.extend_lens, args.index_kpool, 0
    out["nsa_cu_seqlens_k"][0] = 0
    for r in range(args.bs):
        length = to_int32(int(args.seq_lens[r]) + args.length_offset)
        start = length - n
        out["write_requests"][r] = int(args.req_pool_indices[r])
        out["write_start"][r], out["tail_start"][r] = start, divide(start, k) * k
        out["write_counts"][r] = int(args.accept_lens[r])
        pages = pages_of(args, r, length)
        for p in range(-(-n // k)):
            kpool = divide(start, k) + p
            column = max(divide(kpool, PAGE), 0)
            if column < len(pages):
                cell = kpool - divide(kpool, PAGE) * PAGE
                out["write_locs"][r, p] = pages[column] * PAGE + cell
        for j in range(n):
            row, seen = r * n + j, max(start + 1 + j, 0)
            clamped = min(seen // k * k, args.index_topk) + seen % k
            sums += clamped
            out["nsa_cache_seqlens"][row], out["nsa_cu_seqlens_k"][row + 1] = clamped, sums
            out["row_seqlens"][row] = start + 1 + j
            out["kpool_seqlens"][row] = divide(start + 1 + j, k)
            live = pages[: out["kpool_page_table"].shape[1]]
            out["kpool_page_table"][row, : len(live)] = live
    set_schedule(out["kpool_schedule"], out["kpool_seqlens"].tolist(), args.mqa_remainder_last)
    return out


def pages_of(args: KPoolArgs, r: int, length: int) -> list[int]:
    """The live pages of a request."""
    pool, tokens = args.req_to_token.shape
    index = int(args.req_pool_indices[r])
    first_tokens = range(0, min(max(length, 0), tokens), PAGE * args.index_kpool)
    if not 0 <= index < pool:
        return [0 for _ in first_tokens]
    return [int(args.req_to_token[index, token]) // args.server_page_size for token in first_tokens]


def set_schedule(schedule: np.ndarray, kpools: list[int], remainder_last: bool) -> None:
    """Deals out the segments of 256 k-pools, of which each row has at least one."""
    segments = [(row, s) for row, count in enumerate(kpools) for s in range(-(-max(count, 1) // 256))]
    share, longer = divmod(len(segments), PROCESSORS)
    begin = 0
    for p in range(PROCESSORS + 1):
        schedule[p] = segments[begin] if begin < len(segments) else (len(kpools), 0)
        begin += share + (p >= PROCESSORS - longer if remainder_last else p < longer)


def on_gpu(args: KPoolArgs) -> None:
    """Fills copies on the GPU, and copies back what they hold then."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    moved = KPoolArgs(
        **{
            name: each.cuda() if isinstance(each, torch.Tensor) else each
            for name, each in values.items()
        }
    )
    kpool_compiled.bind(moved)()
    for name, out in moved.outputs().items():
        args.outputs()[name].copy_(out)


@pytest.fixture(
    params=[
        pytest.param(kpool_torch.fill, id="torch"),
        pytest.param(lambda args: kpool_compiled.bind(args)(), id="cpu"),
        pytest.param(on_gpu, id="cuda", marks=pytest.mark.gpu),
    ]
)
def fill(request: pytest.FixtureRequest) -> Callable[[KPoolArgs], None]:
    """Each implementation. ``python -m pytest tests/test_kpool.py`` runs all that this machine has."""
    run: Callable[[KPoolArgs], None] = request.param
    return run


def test_every_value_of_the_table(fill: Callable[[KPoolArgs], None]) -> None:
    for seed in range(BATCHES):
        # Of many requests, their rows fill several blocks of the CUDA kernel.
        args = random_args(Random(seed), requests=300 if seed % 100 == 99 else None)
        expected = expect(args)
        fill(args)
        for name, values in expected.items():
            written = args.outputs()[name].numpy()
            assert np.array_equal(written, values), f"seed {seed}, {name}:\n{written}\n{values}"


def test_where_a_closed_kpool_goes_is_written(fill: Callable[[KPoolArgs], None]) -> None:
    """SGLang closes those whose last token is among the first write_counts ones of this forward."""
    for seed in range(BATCHES):
        args = random_args(Random(seed))
        fill(args)
        for r in range(args.bs):
            start, k = int(args.write_start[r]), args.index_kpool
            end = start + int(args.write_counts[r])
            if start >= 0 and end <= args.req_to_token.shape[1]:
                closed = end // k - start // k
                assert closed <= args.write_locs.shape[1]
                assert (args.write_locs[r, :closed] != POISON).all()


def test_a_fill_that_is_switched_off_writes_nothing(fill: Callable[[KPoolArgs], None]) -> None:
    args = random_args(Random(3), enabled=torch.zeros(1, dtype=torch.int32))
    assert args.bs > 0
    fill(args)
    assert all((each == POISON).all() for each in args.outputs().values())


def test_what_may_be_left_out(fill: Callable[[KPoolArgs], None]) -> None:
    names = ("accept_lens", "write_counts", "row_seqlens", "kpool_page_table", "kpool_schedule")
    args = random_args(Random(3), **dict.fromkeys(names))
    expected = expect(random_args(Random(3)))
    fill(args)
    assert not args.outputs().keys() & set(names)
    for name, written in args.outputs().items():
        assert np.array_equal(written.numpy(), expected[name]), name


@pytest.mark.parametrize(
    ("name", "value", "error", "rule"),
    [
        ("index_kpool", 1, ValueError, "index_kpool: must lie in 2 .. 2147483647, got 1"),
        ("index_topk", 6, ValueError, "index_topk: must be a multiple of index_kpool=4, got 6"),
        ("page_size", 66, ValueError, "page_size: must be a multiple of index_kpool=4, got 66"),
        (
            "server_page_size",
            128,
            ValueError,
            "server_page_size: must be 64 or 256 for page_size=64, index_kpool=4, got 128",
        ),
        ("extend_lens", 0, ValueError, "extend_lens: must lie in 1 .. 2147483647, got 0"),
        ("extend_lens", poison(2), TypeError, "extend_lens: must be an int, got Tensor"),
        ("mqa_remainder_last", 1, TypeError, "mqa_remainder_last: must be a bool, got int"),
        ("kpool_seqlens", None, TypeError, "kpool_seqlens: must be a torch.Tensor, got NoneType"),
        (
            "write_requests",
            poison(2),
            TypeError,
            "write_requests: dtype must be int64, got int32",
        ),
        (
            "write_start",
            poison(2, dtype=torch.int64),
            TypeError,
            "write_start: dtype must be int32, got int64",
        ),
        (
            "write_locs",
            poison(2, 1, dtype=torch.int64),
            ValueError,
            "write_locs: shape must be (2, 2) for bs=2, extend_lens=6, index_kpool=4, got (2, 1)",
        ),
        (
            "accept_lens",
            None,
            TypeError,
            "accept_lens: must be a torch.Tensor when write_counts is given, got NoneType",
        ),
        (
            "write_counts",
            None,
            TypeError,
            "write_counts: must be a torch.Tensor when accept_lens is given, got NoneType",
        ),
        (
            "kpool_page_table",
            poison(2, 3),
            ValueError,
            "kpool_page_table: must have 12 rows, got shape (2, 3)",
        ),
        (
            "kpool_schedule",
            poison(1, 2),
            ValueError,
            "kpool_schedule: must have shape (P + 1, 2) for P processors, 1 or more, got (1, 2)",
        ),
    ],
)
def test_what_is_refused(name: str, value: object, error: type, rule: str) -> None:
    with pytest.raises(error) as caught:
        KPoolArgs(**{**valid(), name: value})
    assert str(caught.value) == rule


def test_outputs_that_overlap_are_refused() -> None:
    arguments = valid()
    arguments["tail_start"] = arguments["write_start"]
    with pytest.raises(ValueError, match="write_start: must not overlap tail_start in memory"):
        KPoolArgs(**arguments)


def valid() -> dict[str, object]:
    """Two requests of six rows, k-pools of four tokens, no tensor left out."""
    bs, n, k = 2, 6, 4
    return {
        "seq_lens": tensor([9, 300], torch.int64),
        "req_pool_indices": tensor([0, 1], torch.int64),
        "req_to_token": torch.zeros(2, 600, dtype=torch.int32),
        "extend_lens": n,
        "length_offset": 0,
        "accept_lens": tensor([1, 6], torch.int32),
        "index_kpool": k,
        "index_topk": 128,
        "page_size": PAGE,
        "server_page_size": PAGE * k,
        "nsa_cache_seqlens": poison(bs * n),
        "nsa_cu_seqlens_k": poison(bs * n + 1),
        "write_requests": poison(bs, dtype=torch.int64),
        "write_start": poison(bs),
        "tail_start": poison(bs),
        "write_locs": poison(bs, 2, dtype=torch.int64),
        "write_counts": poison(bs),
        "row_seqlens": poison(bs * n),
        "kpool_seqlens": poison(bs * n),
        "kpool_page_table": poison(bs * n, 3),
        "kpool_schedule": poison(PROCESSORS + 1, 2),
        "mqa_remainder_last": False,
        "enabled": None,
    }


def test_valid_arguments_are_complete() -> None:
    assert valid().keys() == {field.name for field in dataclasses.fields(KPoolArgs)}
