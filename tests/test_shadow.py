"""The comparison behind the shadow check: which cells count, what is reported, what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import CPU

from sglang_nsa_plugin.shadow import Comparison, Difference, Field, Pair, Report

DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]
LENGTHS = [3, 0, 9, -4]  # the last two: over the width, and negative


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


def numbers(device, *shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)


def compared(device, pairs, lengths=LENGTHS, report=None):
    report = report or Report(device)
    comparison = Comparison(pairs, torch.tensor(lengths, dtype=torch.int32, device=device), report)
    comparison.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert report.arrived()
    return comparison, report


def test_equal_tensors_are_counted_by_their_live_cells(device):
    vector, table, paged = numbers(device, 7), numbers(device, 8, 6), numbers(device, 8, 3)
    pairs = [
        Pair("vector", vector, vector.clone()),
        Pair("table", table, table.clone(), 1),
        Pair("paged", paged, paged.clone(), 2),
    ]
    comparison, report = compared(device, pairs)
    assert comparison.difference() is None
    assert report.values[Field.CHECKS] == 1
    rows = 2  # of each request
    assert report.values[Field.VALUES] == 7 + rows * (3 + 0 + 6 + 0) + rows * (2 + 0 + 3 + 0)


def test_cells_behind_the_length_do_not_count(device):
    ours = numbers(device, 8, 6)
    theirs = ours.clone()
    theirs[:2, 3:] = -1  # the first request has 3 tokens
    theirs[2:4] = -1
    theirs[6:] = -1
    comparison, _ = compared(device, [Pair("table", ours, theirs, 1)])
    assert comparison.difference() is None


@pytest.mark.parametrize("column_stride", [1, 2])
def test_first_difference_is_named_with_both_values(device, column_stride):
    ours = numbers(device, 8, 6 * column_stride)[:, ::column_stride]
    theirs = ours.clone()
    theirs[4, 5] = 1_000
    theirs[5, 0] = 2_000
    vector = numbers(device, 5)
    pairs = [Pair("vector", vector, vector.clone()), Pair("table", ours, theirs, 1)]
    comparison, _ = compared(device, pairs)
    assert comparison.difference() == Difference(
        count=2,
        tensor="table",
        row=4,
        column=5,
        ours=int(ours[4, 5]),
        theirs=1_000,
        batch_size=4,
        length=9,
    )


def test_a_vector_has_no_request(device):
    ours = numbers(device, 5)
    theirs = ours + (ours == 3).int() * 7
    comparison, _ = compared(device, [Pair("vector", ours, theirs)])
    difference = comparison.difference()
    assert difference is not None
    assert (difference.row, difference.column, difference.length) == (0, 3, None)
    assert str(difference) == (
        "vector[0, 3], in a batch of 4: ours 3, SGLang's 10; 1 values differ in all"
    )


def test_a_difference_is_kept_and_ends_the_comparisons(device):
    ours = numbers(device, 8, 6)
    theirs = ours.clone()
    theirs[0, 1] = -1
    comparison, report = compared(device, [Pair("table", ours, theirs, 1)])
    first, values = comparison.difference(), report.values
    theirs[0, 0] = -1
    compared(device, [Pair("table", ours, theirs, 1)], report=report)
    assert report.values == values
    assert comparison.difference() == first


def test_a_bound_comparison_reads_what_the_tensors_hold_now(device):
    ours, theirs = numbers(device, 4), numbers(device, 4)
    comparison, report = compared(device, [Pair("vector", ours, theirs)])
    assert comparison.difference() is None
    ours[2] = 9
    comparison.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert report.arrived()
    difference = comparison.difference()
    assert difference is not None
    assert (difference.column, difference.ours, difference.theirs) == (2, 9, 2)


@pytest.mark.gpu
@pytest.mark.unsanitized("the tool waits for the kernels that it watches")
def test_nothing_waits_for_the_device():
    device = torch.device("cuda", 0)
    report = Report(device)
    ours = numbers(device, 4)
    comparison = Comparison(
        [Pair("vector", ours, ours + 1)], torch.ones(2, dtype=torch.int32, device=device), report
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        comparison.run()
        comparison.run()  # its copy has to wait for the one under way
        assert not report.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert report.arrived()
    difference = comparison.difference()
    assert difference is not None
    assert difference.count == 4


@pytest.mark.parametrize(
    ("pair", "error", "said"),
    [
        (
            Pair("table", torch.zeros(2, 2), torch.zeros(2, 2)),
            TypeError,
            "table: must be compared as int32, got torch.float32",
        ),
        (
            Pair("table", numbers(CPU, 4, 2), numbers(CPU, 4, 3)),
            ValueError,
            r"table: must have one shape of 1 or 2 dimensions, got \(4, 2\) and \(4, 3\)",
        ),
        (
            Pair("table", numbers(CPU, 6, 2), numbers(CPU, 6, 2), 1),
            ValueError,
            "table: every request must have the same number of rows, got 6 rows for 4 requests",
        ),
        (
            Pair("table", numbers(CPU, 1, 1).expand(1, 2**28), numbers(CPU, 1, 1).expand(1, 2**28)),
            ValueError,
            r"comparison: columns must be fewer than 2\*\*28, got 268435456",
        ),
        (
            Pair("table", numbers(CPU, 1, 1).expand(2**28, 1), numbers(CPU, 1, 1).expand(2**28, 1)),
            ValueError,
            r"comparison: rows must be fewer than 2\*\*28, got 268435456",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(pair, error, said):
    with pytest.raises(error, match=said):
        Comparison([pair], torch.zeros(4, dtype=torch.int32), Report(CPU))
