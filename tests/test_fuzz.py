"""Random batches, for each implementation, against two oracles: ``cases.expect`` and SGLang's kernel.

Each implementation fills 10,000 batches, or as many as asked for:
``python -m pytest tests/test_fuzz.py --fuzz-batches 1000000 --timeout 0``.
Interpreted Triton takes 60 ms for one, so it fills fewer where there is no GPU, and all of them,
compiled, where there is one. SGLang's kernel takes 30 ms interpreted; compiled, each batch size
compiles it anew. Batch n is made from seed n, so a run repeats the one before. Hypothesis is asked
for a small batch when one fails; left to choose them all, it repeats four of ten.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import sglang_kernel
import torch
from cases import (
    CPU,
    INT32_MAX,
    POISON,
    Backend,
    Case,
    Guarded,
    expect,
    fill_args,
    vast_vector,
)
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from random_cases import INDEX_INPUTS, Scale, decode_case, random_case, sglang_case, verify_case

from sglang_nsa_plugin import FillArgs

ALL_INT32 = dict.fromkeys(INDEX_INPUTS, torch.int32)
# By implementation; "cpu:triton" is interpreted.
BATCHES = {"cpu:triton": 500, "cuda:torch": 1000}  # torch was tried with all of them on the CPU
FAR_BATCHES = {"cpu:triton": 50}
SGLANG_BATCHES = {"cpu:cpu": 400, "cpu:torch": 400}


def fuzz(check: Callable[[Any], object], make: Callable[[Random], object], batches: int) -> None:
    """Checks what ``make`` makes of each seed below ``batches``."""
    for number in range(batches):
        batch = make(Random(number))
        try:
            check(batch)
        except AssertionError as error:
            failed, why = smallest(check, make) or (batch, error)
            raise AssertionError(
                f"batch {number} fails; one as small as can be: {why}\n{failed}"
            ) from error


def smallest(check: Callable[[Any], object], make: Callable[[Random], object]) -> tuple | None:
    """A failing batch, shrunk by hypothesis, and its error; None where hypothesis finds none."""

    def error_of(batch: object) -> AssertionError | None:
        try:
            check(batch)
        except AssertionError as error:
            return error
        return None

    batches = st.randoms(use_true_random=False).map(make)
    with contextlib.suppress(NoSuchExample):
        found = find(batches, error_of, settings=settings(max_examples=1000), random=Random(0))
        return found, error_of(found)
    return None


@pytest.fixture
def scale(fill_backend: Backend, tile: int) -> Scale:
    if fill_backend.interpreted:
        return Scale(requests=tile, columns=16)
    return Scale(few_kinds=str(fill_backend) == "cuda:triton")


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> int | None:
    number: int | None = request.config.getoption("--fuzz-batches")
    return number


def test_any_batch(fill_backend: Backend, scale: Scale, asked_for: int | None) -> None:
    batches = asked_for or BATCHES.get(str(fill_backend), 10_000)
    fuzz(fill_backend.check, functools.partial(random_case, scale=scale), batches)


# Offsets above 2**31


@pytest.mark.vast
@pytest.mark.unsanitized("it notes of each byte of 17 GB whether it was written", tools=("initcheck",))
def test_any_batch_with_a_tensor_that_spans_2_to_the_31(
    fill_backend: Backend, scale: Scale, asked_for: int | None
) -> None:
    """The last row of one tensor lies that many elements after its first."""
    vast = vast_vector(fill_backend.device)

    def make(rng: Random) -> tuple[Case, str]:
        case = replace(random_case(rng, scale), dtypes=ALL_INT32, shared={})
        return case, rng.choice([*case.input_values(), *case.output_shapes()])

    def check(batch: tuple[Case, str]) -> None:
        case, name = batch
        tensors = spread(Guarded(case, fill_backend.device).args, name, vast)
        landing = vast[:4096]  # of an offset that wraps
        try:
            check_values(fill_args(case, **tensors), fill_backend.fill)
            assert not landing.any(), f"{name}: written to at an offset that wrapped at 2**31"
        finally:
            tensors[name].zero_()
            landing.zero_()

    fuzz(check, make, asked_for or FAR_BATCHES.get(str(fill_backend), 500))


def spread(args: FillArgs, name: str, vast: torch.Tensor) -> dict[str, object]:
    """The arguments of ``args`` with one tensor in vast memory, as far apart as it takes."""
    tensors: dict[str, object] = {**args.inputs(), **args.outputs(), "extend_lens": args.extend_lens}
    near = tensors[name]
    assert isinstance(near, torch.Tensor)
    stride = -(-(2**31 + 4) // max(near.shape[0] - 1, 1))
    far = vast.as_strided(near.shape, (stride, 1)[: near.dim()], 2**31)
    tensors[name] = far.copy_(near)
    return tensors


def check_values(args: FillArgs, fill: Callable[[FillArgs], object]) -> None:
    expected = {name: torch.from_numpy(values) for name, values in expect(args).items()}
    inputs = {name: tensor.clone() for name, tensor in args.inputs().items()}
    fill(args)
    for name, tensor in (args.inputs() | args.outputs()).items():
        wanted = (expected | inputs)[name].cpu()
        assert torch.equal(tensor.cpu(), wanted), f"{name}: {tensor.tolist()}, not {wanted.tolist()}"


# Against SGLang


def test_sglangs_own_kernel_writes_the_same(fill_backend: Backend, asked_for: int | None) -> None:
    compare_with(sglang_kernel.fill, sglang_case, fill_backend, asked_for)


def test_sglangs_own_kernel_of_target_verify(fill_backend: Backend, asked_for: int | None) -> None:
    compare_with(sglang_kernel.fill_target_verify, verify_case, fill_backend, asked_for)


def test_sglangs_own_kernel_of_decode(fill_backend: Backend, asked_for: int | None) -> None:
    compare_with(sglang_kernel.fill_decode, decode_case, fill_backend, asked_for)


SglangFill = Callable[[FillArgs], dict[str, torch.Tensor]]


def compare_with(
    sglang_fill: SglangFill, make: Callable[[Random], Case], backend: Backend, asked_for: int | None
) -> None:
    sglang_kernel.kernel()  # skips where there is none

    def check(case: Case) -> None:
        check_against_sglang(sglang_fill, case, backend)

    fuzz(check, make, asked_for or SGLANG_BATCHES.get(str(backend), 100))


def check_against_sglang(sglang_fill: SglangFill, case: Case, backend: Backend) -> None:
    """Compares every live cell. SGLang copies whole blocks of a table, also past the length."""
    args = Guarded(case, backend.device).args
    args.req_to_token.bitwise_and_(INT32_MAX)  # its division rounds negative slots up
    theirs = sglang_fill(args)
    backend.fill(args)
    rows = torch.tensor(case.extend_lens).expand(args.bs).to(args.device)
    length = (args.seq_lens + args.length_offset).repeat_interleave(rows)[:, None]
    for name, tensor in args.outputs().items():
        page = args.page_size if name == "real_page_table" else 1
        first_token = torch.arange(tensor.shape[-1], device=args.device) * page
        live = first_token < length if tensor.dim() == 2 else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[live], theirs[name][live]), name


# That it can fail


def one_too_many(args: FillArgs) -> None:
    args.nsa_cu_seqlens_k[-1:] += 1


def unclamped(args: FillArgs) -> None:
    """Lengths below 0 where a request is shorter than its draft."""
    if isinstance(args.extend_lens, int) and args.seqlens_expanded is not None:
        first = args.seq_lens.to(torch.int32) + args.length_offset - args.extend_lens + 1
        rows = first[:, None] + torch.arange(args.extend_lens, dtype=torch.int32)
        args.seqlens_expanded.copy_(rows.flatten())


def cell_past_the_length(args: FillArgs) -> None:
    if args.page_table_1 is not None and isinstance(args.extend_lens, int):
        for row in range(args.rows):
            length = int(args.seq_lens[row // args.extend_lens]) + args.length_offset
            if 0 <= length < args.page_table_1.shape[1]:
                args.page_table_1[row, length] = 0


def cell_before_the_tensor(args: FillArgs) -> None:
    lengths = args.cache_seqlens
    lengths.as_strided((1,), (1,), lengths.storage_offset() - 1).fill_(0)


def rounded_to_zero(args: FillArgs) -> None:
    """Pages of negative slots, as C divides."""
    if args.real_page_table is not None:
        negative = (args.real_page_table < 0) & (args.real_page_table != POISON)
        args.real_page_table[negative] += 1


def without_offset(args: FillArgs) -> None:
    args.cache_seqlens.copy_(args.seq_lens)


def input_written(args: FillArgs) -> None:
    args.seq_lens[:1] += 1


PLANTED = [
    one_too_many,
    unclamped,
    cell_past_the_length,
    cell_before_the_tensor,
    rounded_to_zero,
    without_offset,
    input_written,
]


@pytest.mark.parametrize("error", PLANTED, ids=lambda error: error.__name__)
def test_planted_errors_are_found(error: Callable[[FillArgs], None]) -> None:
    correct = Backend(CPU, "cpu")

    def check(case: Case) -> None:
        Guarded(case).check(lambda args: (correct.fill(args), error(args)))

    with pytest.raises(AssertionError, match=r"wrote -?\d+, expected -?\d+"):
        fuzz(check, functools.partial(random_case, scale=Scale()), 500)
