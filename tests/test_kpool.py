"""A k-pooling fill: each implementation against the contract's table, and what is refused.

Each fills 10,000 random batches in guarded memory, torch fewer, or as many as ``--fuzz-batches`` says.
The tests marked gpu run csrc/kpool.cu: ``python -m pytest tests/test_kpool.py -m gpu``.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from cases import INT32_MAX, INT32_MIN, POISON, Backend, vast_vector
from kpool_cases import GuardedKPool, KPoolCase, check, expect, random_case, shapes_of
from test_fuzz import fuzz

from sglang_nsa_plugin.kpool_args import INPUTS, OUTPUTS, KPoolArgs

PAGE = 64  # k-pools
PROCESSORS = 3
BATCHES = {"cpu:kpool_torch": 2000, "cuda:kpool_torch": 500}


@pytest.fixture(
    params=[
        pytest.param(("cpu", "kpool_torch"), id="torch"),
        pytest.param(("cpu", "kpool_compiled"), id="cpu"),
        pytest.param(("cuda", "kpool_torch"), id="torch-on-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "kpool_compiled"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    device, name = request.param
    return Backend(torch.device(device), name)


def tensor(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


def case_of(seq_lens: list[int], *, n: int = 4, offset: int = 0) -> KPoolCase:
    """All outputs, k-pools of four tokens, three pages of the index, slot = 64 * token."""
    bs, k = len(seq_lens), 4
    return KPoolCase(
        inputs={
            "seq_lens": seq_lens,
            "req_pool_indices": [r % 2 for r in range(bs)],
            "req_to_token": [[PAGE * token for token in range(3 * PAGE * k)]] * 2,
            "accept_lens": [n] * bs,
        },
        numbers={
            "extend_lens": n,
            "length_offset": offset,
            "index_kpool": k,
            "index_topk": 2 * PAGE,
            "server_page_size": PAGE,
        },
        outputs=shapes_of(bs, n, k, 3, PROCESSORS),
        dtypes={},
        layouts={},
    )


def written_by(backend: Backend, case: KPoolCase) -> dict[str, list]:
    """Checks the case, and returns what was written."""
    guarded = GuardedKPool(case, backend.device)
    guarded.check(backend.fill)
    return {name: each.tolist() for name, each in guarded.args.outputs().items()}


def test_any_batch(backend: Backend, request: pytest.FixtureRequest) -> None:
    asked_for = request.config.getoption("--fuzz-batches")
    run = functools.partial(check, fill=backend.fill, device=backend.device)
    fuzz(run, random_case, asked_for or BATCHES.get(str(backend), 10_000))


def test_draft_tokens_that_close_kpools(backend: Backend) -> None:
    """Verify of four tokens after 6 and after 8: k-pool 1 is closed by both, k-pool 2 by the second."""
    out = written_by(backend, case_of([6, 8], offset=4))
    assert (out["write_start"], out["tail_start"]) == ([6, 8], [4, 8])
    assert out["row_seqlens"] == [7, 8, 9, 10, 9, 10, 11, 12]
    assert out["kpool_seqlens"] == [1, 2, 2, 2, 2, 2, 2, 3]
    assert out["write_locs"] == [[1], [2]]
    assert out["nsa_cache_seqlens"] == [7, 8, 9, 10, 9, 10, 11, 12]


def test_the_last_kpool_of_a_page(backend: Backend) -> None:
    """k-pools 63 and 64 lie in pages 0 and 1 of the index, whose first slots are 0 and 64 * 256."""
    out = written_by(backend, case_of([252, 256], offset=4))
    assert out["write_locs"] == [[63], [256 * PAGE]]
    assert out["kpool_page_table"] == [[0, POISON, POISON]] * 4 + [[0, 256, POISON]] * 4


def test_what_is_kept_above_the_top_k(backend: Backend) -> None:
    """128 tokens of closed k-pools, and those of the last one that is not closed."""
    out = written_by(backend, case_of([133]))
    assert out["row_seqlens"] == [130, 131, 132, 133]
    assert out["nsa_cache_seqlens"] == [130, 131, 128, 129]
    assert out["nsa_cu_seqlens_k"] == [0, 130, 261, 389, 518]


def test_requests_shorter_than_their_rows(backend: Backend) -> None:
    """Padded requests have one token: the write plan begins before 0, the lengths do not."""
    out = written_by(backend, case_of([1], n=6))
    assert out["nsa_cache_seqlens"] == [0, 0, 0, 0, 0, 1]
    assert out["row_seqlens"] == [-4, -3, -2, -1, 0, 1]
    assert out["kpool_seqlens"] == [-1, 0, 0, 0, 0, 0]
    assert (out["write_start"], out["tail_start"], out["write_locs"]) == ([-5], [-4], [[-1, 0]])


def test_extreme_lengths(backend: Backend) -> None:
    lengths = [INT32_MAX, INT32_MIN, -1, 0, INT32_MIN + 3, INT32_MAX - 1]
    for offset in (0, 4, INT32_MAX):
        check(case_of(lengths, offset=offset), backend.fill, backend.device)


def test_no_requests(backend: Backend) -> None:
    out = written_by(backend, case_of([]))
    assert out["nsa_cu_seqlens_k"] == [0]
    assert out["kpool_schedule"] == [[0, 0]] * (PROCESSORS + 1)


@pytest.mark.parametrize("requests", [63, 64, 65, 1000])
def test_rows_of_several_blocks(backend: Backend, requests: int) -> None:
    """A block of the CUDA kernel takes 256 rows; its schedule's threads share out all of them."""
    lengths = [(977 * r) % 3000 for r in range(requests)]
    check(case_of(lengths), backend.fill, backend.device)


@pytest.mark.parametrize("processors", [1, 2, 78, 132, 300])
@pytest.mark.parametrize("remainder_last", [False, True])
def test_schedules(backend: Backend, processors: int, remainder_last: bool) -> None:
    for kpools in ([0], [1, 255, 256, 257], [70_000, 3, 511, 512, 513], [*range(250, 290)]):
        case = case_of([4 * count for count in kpools], n=3)
        case = dataclasses.replace(
            case,
            numbers={**case.numbers, "mqa_remainder_last": remainder_last},
            outputs={**case.outputs, "kpool_schedule": (processors + 1, 2)},
        )
        check(case, backend.fill, backend.device)


def test_where_a_closed_kpool_goes_is_written(backend: Backend) -> None:
    """SGLang closes those whose last token is among the first write_counts ones of this forward."""
    closed = 0
    for n in (1, 4, 7):
        out = written_by(backend, case_of([*range(n, 3 * PAGE * 4 + 1)], n=n))
        for start, locs in zip(out["write_start"], out["write_locs"], strict=True):
            kpools = [*range(start // 4, (start + n) // 4)]
            wanted = [kpool // PAGE * PAGE * 256 + kpool % PAGE for kpool in kpools]
            assert locs[: len(kpools)] == wanted
            closed += len(kpools)
    assert closed > 1000


def test_a_fill_that_is_switched_off_writes_nothing(backend: Backend) -> None:
    case = case_of([5, 300])
    guarded = GuardedKPool(
        dataclasses.replace(case, inputs={**case.inputs, "enabled": [0]}), backend.device
    )
    bound = backend.bind(guarded.args)
    for enabled in (0, 1, 0, -1):
        guarded.args.enabled.fill_(enabled)
        guarded.poison()
        guarded.check(lambda _: bound())
        written = any((each != POISON).any() for each in guarded.args.outputs().values())
        assert written == (enabled != 0)


def test_a_bound_fill_follows_its_inputs(backend: Backend) -> None:
    guarded = GuardedKPool(case_of([5, 300, 1]), backend.device)
    bound = backend.bind(guarded.args)
    for lengths, indices in (
        ([64, 1, 700], [0, 1, 0]),
        ([1, 1, 1], [1, 2, -1]),
        ([256, 257, 4], [1] * 3),
    ):
        guarded.args.seq_lens.copy_(torch.tensor(lengths))
        guarded.args.req_pool_indices.copy_(torch.tensor(indices))
        guarded.check(lambda _: bound())  # a shorter request leaves the cells after it alone


@pytest.mark.parametrize("name", [name for name in (*INPUTS, *OUTPUTS) if name != "enabled"])
@pytest.mark.vast
@pytest.mark.unsanitized("it notes of each byte of 17 GB whether it was written", tools=("initcheck",))
def test_offsets_above_int32(backend: Backend, name: str) -> None:
    """The last row of a tensor, or its last element, lies more than 2**31 words after the first one."""
    case = case_of([33, 9, 256], n=1)
    slots = [*case.inputs["req_to_token"], [5] * 768]
    case = dataclasses.replace(
        case, inputs={**case.inputs, "req_to_token": slots, "req_pool_indices": [1, 2, 0]}
    )
    guarded = GuardedKPool(case, backend.device)
    tensors = guarded.args.inputs() | guarded.args.outputs()
    vast, near = vast_vector(backend.device), tensors[name]
    words = near.element_size() // 4
    stride = -(-(2**31 + 40) // words // (near.shape[0] - 1))
    strides = (stride, 1)[: near.dim()]
    far = vast.view(near.dtype).as_strided(near.shape, strides, 2**31 // words)
    tensors[name] = far.copy_(near)
    args = KPoolArgs(**case.numbers, **tensors)
    wanted = {key: torch.from_numpy(values) for key, values in expect(args).items()}
    backend.fill(args)
    for key, each in args.outputs().items():
        assert torch.equal(each.cpu(), wanted[key]), key
    assert not vast[:4096].any(), "written to at an offset that wrapped"


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
