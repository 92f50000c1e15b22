"""What integration/gpu/bounds.py finds in rows made by hand: missed goals, and what got slower."""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import pytest

from integration.gpu import bounds


def row(tables: str = "paged", **changes):
    """A cell that meets every goal: 4.2 MB at 4,200 GB/s are 1 µs."""
    return {
        "decode_impl": "flashmla_sparse",
        "requests": 8,
        "length": 2_048,
        "width": 163_904,
        "draft_tokens": 4,
        "tables": tables,
        "bytes": {"read": 2_100_000, "written": 2_100_000},
        **host_us(2.5),
        **gpu(2.0, 2.7),
        "compiles": {"sglang": 1, "ours": 0},
        **changes,
    }


def gpu(cuda: float, sglang_kernel: float = 100.0, noise: float = 0.1):
    return timed("gpu", cuda, sglang_kernel, noise)


def host_us(cuda: float, sglang_kernel: float = 200.0, noise: float = 0.1):
    return timed("host", cuda, sglang_kernel, noise)


def timed(clock: str, cuda: float, sglang_kernel: float, noise: float):
    return {
        f"{clock}_us": {"cuda": cuda, "sglang_kernel": sglang_kernel},
        f"{clock}_quartiles": {"cuda": [cuda - noise, cuda + noise]},
    }


def bench(*cases, gather=(), widths=()):
    return {
        "gpu": "NVIDIA H200",
        "copy_gb_s": {"median": 4_200.0},
        "cases": list(cases),
        "gather_us": [
            {"requests": n, "length": length, "width": 163_904, "us": us} for n, length, us in gather
        ],
        "widths_us": [{"requests": n, "width": width, "us": {"median": us}} for n, width, us in widths],
    }


def on_host(cuda: float):
    return row("both", **host_us(cuda))


def at_widths(*times):
    return bench(widths=[(8, width, us) for width, us in zip(bounds.WIDTHS, times, strict=True)])


def of_copy(share: float):
    """A cell of 84 MB, which a copy moves in 20 µs."""
    return row("both", bytes={"read": 42_000_000, "written": 42_000_000}, **gpu(20.0 / share))


MEETS = [
    (bounds.paged_kernel, bench(row(**gpu(3.0)), row("both", **gpu(50.0)))),
    (bounds.paged_kernel, bench(row(**gpu(24.0)), gather=[(8, 2_048, 20.0)])),
    (bounds.widths, at_widths(2.0, 2.3, 2.1)),
    (bounds.widths, at_widths(10.0, 11.5, 10.0)),
    (bounds.both_tables, bench(of_copy(0.851))),
    (bounds.both_tables, bench(row("both", **gpu(50.0)))),  # moves less
    (bounds.never_slower, bench(row(**gpu(2.7, 2.7)))),
    (bounds.host, bench(on_host(3.0))),
    (bounds.host_of_the_run, bench(*map(on_host, (9.0, 3.0, 9.0, 9.0)))),
    (bounds.nodes, bench(row(), row(nodes={"kernel": 2, "event_record": 1}))),
    (bounds.nodes, bench(row(decode_impl="flashmla_kv", nodes={"kernel": 6}))),
    (bounds.compiles, bench(row())),
]
MISSES = [
    (bounds.paged_kernel, bench(row(**gpu(3.01))), "cuda 3.01 µs, at most 3.00"),
    (bounds.paged_kernel, bench(row(**gpu(24.1)), gather=[(8, 2_048, 20.0)]), "at most 24.00"),
    # a gather that takes less, or of another cell, allows no more
    (bounds.paged_kernel, bench(row(**gpu(3.1)), gather=[(8, 2_048, 2.0)]), "at most 3.00"),
    (bounds.paged_kernel, bench(row(**gpu(12.0)), gather=[(8, 4_096, 20.0)]), "at most 3.00"),
    (bounds.widths, at_widths(2.0, 2.1, 2.31), "2.31 µs at width 1,048,640"),
    (bounds.both_tables, bench(of_copy(0.84)), "0.840 of the copy bandwidth"),
    (bounds.never_slower, bench(row("both", **gpu(2.8, 2.7))), "cuda 2.80 µs, SGLang's kernel 2.70"),
    (bounds.never_slower, bench(row(**gpu(2.8, 2.7))), "cuda 2.80 µs, SGLang's kernel 2.70"),
    (bounds.host, bench(on_host(2.9), on_host(3.1)), "3.10 µs on the host, at most 3.00"),
    (
        bounds.host_of_the_run,
        bench(*map(on_host, (9.0, 2.0, 9.0, 9.0, 3.1, 9.0))),
        "3.10 µs on the host, at most 3.00",
    ),
    (bounds.nodes, bench(row(nodes={"kernel": 3, "memcpy": 1})), "4 nodes, at most 3"),
    (bounds.nodes, bench(row(decode_impl="flashmla_kv", nodes={"kernel": 7})), "7 nodes, at most 6"),
    (bounds.compiles, bench(row(compiles={"sglang": 0, "ours": 2})), "2 compiled"),
]


@pytest.mark.parametrize(("goal", "met"), MEETS)
def test_a_cell_that_meets_a_goal_is_not_named(goal, met):
    assert goal(met) == []


@pytest.mark.parametrize(("goal", "missed", "named"), MISSES)
def test_a_cell_that_misses_a_goal_is_named(goal, missed, named):
    (line,) = goal(missed)
    assert "8 × 2,048" in line
    assert named in line


def test_every_goal_has_a_cell_on_either_side():
    assert {goal for goal, _ in MEETS} == set(bounds.GOALS)
    assert {goal for goal, *_ in MISSES} == set(bounds.GOALS)


@pytest.mark.parametrize(
    ("old", "new", "is_slower"),
    [
        (gpu(2.0), gpu(2.0), False),
        (gpu(2.0), gpu(2.4), True),
        (gpu(2.0, noise=0.3), gpu(2.4), False),  # the quartiles overlap
        (gpu(2.0), gpu(2.4, noise=0.3), False),
        (gpu(2.0), gpu(2.29, noise=0.01), False),  # as unchanged kernels do between runs
        (gpu(30.0), gpu(31.4), False),
        (gpu(30.0), gpu(31.6), True),
        (gpu(2.4), gpu(2.0), False),
        # SGLang's kernel on the GPU is no excuse, SGLang's call on a slower host is one
        (gpu(2.0, 10.0), gpu(2.6, 20.0), True),
        (host_us(2.5), host_us(4.0), True),
        (host_us(2.5, 200.0), host_us(4.0, 400.0), False),
        (host_us(2.5, 200.0), host_us(6.0, 400.0), True),
        (host_us(2.5, 200.0), host_us(4.0, 100.0), True),
    ],
)
def test_what_is_slower_beyond_noise_is_a_regression(old, new, is_slower):
    lines, found = bounds.compare(bench(row(**old)), bench(row(**new)))
    assert found == is_slower
    named = [line for line in lines if "→" in line and "8 × 2,048" in line]
    assert len(named) == is_slower
    assert lines[0] == f"Regressions beyond noise: {int(is_slower)} of 2 times"


def test_a_regression_shows_both_runs_and_sglangs_own_time():
    lines, _ = bounds.compare(bench(row(**gpu(2.0, 10.0))), bench(row(**gpu(3.0, 11.0))))
    (line,) = [line for line in lines if "gpu cuda" in line]
    assert "2.00 (1.90 to 2.10) → 3.00 (2.90 to 3.10)" in line
    assert "+50%" in line
    assert "10.00 → 11.00" in line


def test_the_whole_fill_is_compared_with_sglangs_whole_fill():
    old = row()
    for clock in ("gpu", "host"):
        old[f"{clock}_us"] |= {"ours": 5.0, "sglang": 50.0}
        old[f"{clock}_quartiles"]["ours"] = [4.9, 5.1]
    new = deepcopy(old)
    new["gpu_us"]["ours"], new["gpu_quartiles"]["ours"] = 6.0, [5.9, 6.1]
    changes = list(bounds.changes(bench(old), bench(new)))
    assert [change.what for change in changes] == ["gpu cuda", "gpu ours", "host cuda", "host ours"]
    assert [change.is_regression for change in changes] == [False, True, False, False]
    assert changes[1].sglang == (50.0, 50.0)


def test_a_cell_that_is_no_longer_measured_is_a_regression():
    lines, found = bounds.compare(bench(row(), row(requests=9)), bench(row(), row(requests=10)))
    assert found
    assert [line for line in lines if "no longer measured: flashmla_sparse 9 × 2,048" in line]


def test_runs_of_two_gpus_are_not_compared():
    other = {**bench(row()), "gpu": "NVIDIA H100 80GB HBM3"}
    with pytest.raises(ValueError, match="NVIDIA H200 and NVIDIA H100"):
        bounds.compare(bench(row()), other)


def test_many_missed_cells_are_counted():
    missed = bounds.missed_goals(bench(*(on_host(3.0 + n) for n in range(1, 21))))
    shown = [line for line in missed if "on the host" in line]
    assert len(shown) == bounds.SHOWN + 1  # and host_of_the_run
    assert "      and 8 more" in missed


def result_file(path, run):
    parts = {"bench": run, "gather": run.pop("gather_us"), "widths": run.pop("widths_us")}
    path.write_text(json.dumps({"parts": parts}))
    return str(path)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bounds", *arguments])
    code = bounds.main()
    return code, capsys.readouterr().out


def test_the_command_shows_missed_goals_and_fails_on_a_regression_alone(tmp_path, monkeypatch, capsys):
    fast = result_file(tmp_path / "fast.json", bench(row(), row(requests=9, **gpu(3.5))))
    slow = result_file(tmp_path / "slow.json", bench(row(), row(requests=9, **gpu(4.5))))
    code, text = printed(monkeypatch, capsys, fast)
    assert code == 0
    assert "paged_kernel     1 missed\n      flashmla_sparse 9 × 2,048 paged" in text
    assert "widths           met\n" in text
    code, text = printed(monkeypatch, capsys, "--compare", fast, slow)
    assert code == 1
    assert text.startswith("Regressions beyond noise: 1 of 4 times\n")
    assert "paged_kernel     1 missed\n" in text
    assert printed(monkeypatch, capsys, "--compare", slow, fast)[0] == 0


def test_a_file_that_lacks_a_part_is_refused():
    with pytest.raises(ValueError, match="no part gather; run `make bench`"):
        bounds.measured({"parts": {"bench": bench(row())}})
