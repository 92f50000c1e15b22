"""docs/results.md and docs/releases.md show what the result files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from integration.figures import build, gain, gpu_checks, one_fill, results_page, servers, step_cost
from integration.figures.committed import load
from integration.serving import compare
from integration.serving.server import Answer

ROOT = Path(__file__).resolve().parent.parent.parent
BOTH, PAGED = "both", "paged"


def check() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "integration.figures.build", "--check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_pages_and_the_picture_are_those_of_the_result_files():
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_differs_is_named(monkeypatch):
    page = build.ROOT / "docs" / "results.md"
    assert build.out_of_date({page: page.read_text()}) == []
    (line,) = build.out_of_date({page: page.read_text() + "more"})
    assert line == "docs/results.md is out of date: run python -m integration.figures.build"
    monkeypatch.setattr(build, "for_picture", dict)
    (line,) = build.out_of_date({})
    assert line == "docs/host-time.svg is out of date: run python -m integration.figures.plot"


def cell(tables, **changes):
    """A cell of the grid with figures that can be told apart."""
    kernels = {"sglang_kernel": 8.0, "cuda": 2.0 if tables == PAGED else 4.0}
    row = {
        "decode_impl": "flashmla_sparse", "requests": 8, "length": 2_048, "width": 163_904,
        "draft_tokens": 4, "tables": tables, "values_compared": 1_000,
        "bytes": {"read": 1_048_576, "written": 1_048_576},
        "host_us": {"sglang_kernel": 30.0, "cuda": 2.5}, "gpu_us": kernels,
        "compiles": {"sglang": 1, "ours": 0},
    }  # fmt: skip
    if tables == PAGED:
        row["host_us"] |= {"sglang": 210.0, "ours": 3.25}
        row["gpu_us"] = {**kernels, "sglang": 16.0, "ours": 6.0}
        row |= {
            "nodes": {"kernel": 2, "event_record": 1},
            "launches": {"sglang": 6, "ours": 0},
            "memory_bytes": {"sglang": 42_000_000, "ours": 700_000},
        }
    return {**row, **changes}


def committed(folder, date="2026-11-24T00:00:00+00:00", sglang="0.5.17", cases=None):
    figure = {"median": 4_096.0, "q1": 1.0, "q3": 1.0}
    bench = {
        "floor_us": {**figure, "median": 1.25},
        "launch_us": figure,
        "copy_gb_s": figure,
        "copy_by": "kernel",
    }
    run = {
        "date": date, "commit": "0123456789", "gpus": ["NVIDIA H200, 580.1"],
        "versions": {"sglang": sglang, "torch": "2.11.0"},
        "parts": {"bench": {**bench, "cases": cases or [cell(BOTH), cell(PAGED)]}},
    }  # fmt: skip
    path = folder / f"bench-h200-{sglang}.json"
    path.write_text(json.dumps(run))
    return path


def shown(path) -> str:
    """The section as one line for each paragraph."""
    return "\n\n".join(
        part if part.startswith("|") else part.replace("\n", " ") for part in one_fill.section(path)
    )


def test_the_cells_of_a_bench_are_shown(tmp_path):
    text = shown(committed(tmp_path))
    assert "| 8 | 2,048 | 210 | 3.2 | 2.5 | 16.0 | 6.0 |" in text
    # 2 MiB in 4 µs are 524 GB/s
    assert "| 8 | 2,048 | 8.0 | 4.0 | 13% | 8.0 | 2.0 |" in text
    assert "at most 2 graph nodes with flashmla_sparse, beside the event" in text
    assert "take 0.7 MB and SGLang's 42.0 MB" in text
    assert "compiled 2 times and the plugin's 0 times; 2,000 values were compared" in text
    assert "4,096 GB/s" in text
    assert "1.25 µs" in text
    assert "NVIDIA H200, driver 580.1, SGLang 0.5.17, torch 2.11.0, 2026-11-24, commit 0123456." in text


def test_every_figure_of_the_table_is_the_files(tmp_path):
    """Another number in the file makes another page."""
    before = shown(committed(tmp_path))
    for kind, path in (("host_us", "sglang"), ("host_us", "ours"), ("host_us", "cuda"),
                       ("gpu_us", "sglang"), ("gpu_us", "ours"), ("gpu_us", "cuda")):  # fmt: skip
        changed = cell(PAGED)
        changed[kind][path] += 7
        assert shown(committed(tmp_path, cases=[cell(BOTH), changed])) != before


def test_the_newest_bench_is_shown(tmp_path):
    assert one_fill.newest(tmp_path) is None
    committed(tmp_path, "2026-11-20T00:00:00+00:00", "0.5.23")
    newest = committed(tmp_path, "2026-11-24T00:00:00+00:00", "0.5.17")
    only_dram = {"date": "2026-12-01T00:00:00+00:00", "parts": {"dram": {}}}
    (tmp_path / "bench-h200-0.5.22.json").write_text(json.dumps(only_dram))
    on_another = {"date": "2026-12-01T00:00:00+00:00", "parts": {"bench": {}}}
    (tmp_path / "bench-h100-0.5.17.json").write_text(json.dumps(on_another))
    assert one_fill.newest(tmp_path) == newest


def test_what_differs_between_servers_is_counted():
    meta = {"spec_verify_ct": 2, "spec_accept_histogram": [1, 1]}
    ours, theirs = (Answer([1, 2], 0.1, meta) for _ in range(2))
    other = Answer([1, 3], 0.1, meta)
    rows = [compare.comparison(ours, theirs, 10), compare.comparison(other, theirs, 10)]
    many = compare.repeated([[ours, other]], [[theirs, theirs]], [[7], [8]])
    record = {"replays": 12, "fallbacks": {"a reason": 3}}
    h100 = {"of": {"gpus": ["NVIDIA H100, 1.2"]}}
    parts = {
        "fp8.one_at_a_time": {**h100, **compare.summary(rows)},
        "fp8.many_at_once": {"each": [many]},
        "fp8.record": {"record": record},
        "corruption.cu_seqlens_k": {"caught_by": []},
        "corruption.real_page_table": {"caught_by": ["tokens", "accepted drafts"]},
        "dropped-fa3.start": {},
        "dropped-fa3.verify:page_table_1=-1": {"caught_by": []},
        "profile.start": {},
        "profile.16": {arm: {"roles": {"verify": {"calls": 12, "launches": 60 * at, "gpu_us": 600 * at}}}
                       for at, arm in enumerate(("plugin", "sglang"))},
    }  # fmt: skip
    _, table, _, wrong, _, dropped, _, profile = servers.section(parts)
    assert "| fa3 | `verify:page_table_1=-1` | nothing |" in dropped
    assert profile.splitlines()[-2:] == ["| 16 | SGLang | 5 | 50 µs |", "| 16 | plugin | 0 | 0 µs |"]
    assert "more than a graph holds (NVIDIA H100, driver 1.2) | 4 |" in table.splitlines()[-1]
    assert table.splitlines()[-1].endswith(" | 4 | 8 | 2 | 1.50 → 1.50 | 12 | 3 |")
    assert "| `real_page_table` | tokens and accepted drafts |" in wrong
    assert "| `cu_seqlens_k` | nothing: no consumer reads it |" in wrong
    assert servers.section({}) == []


def test_what_a_whole_step_takes_is_added_up_over_its_roles(tmp_path):
    roles = [
        {
            "role": name,
            "us": {"2048": {"ours": 4.25, "sglang": 100.5}},
            "bytes": {"ours": 2_000_000, "sglang": 9e8},
        }
        for name in ("draft-extend", "draft-decode", "verify")
    ]
    run = {
        "command": "python -m integration.gpu.step_cost",
        "gpus": ["NVIDIA H200, 580.1"],
        "versions": {"sglang": "0.5.17"},
        "commit": "0" * 40,
        "date": "2026-11-28",
        "parts": {"1m": {"context": 1 << 20, "requests": 64, "roles": roles}},
    }
    (tmp_path / "step-cost-h200-0.5.17.json").write_text(json.dumps(run))
    *_, table = step_cost.section(tmp_path)
    assert table.splitlines()[-1] == "| 1 M | 2,048 | 301.5 µs | 12.8 µs | 2,700.0 MB | 6.0 MB |"
    assert step_cost.section(tmp_path / "nothing") == []
    for role in roles:
        role["host_us"] = {"2048": {"ours": 5.5, "sglang": 200.0}}
    run["command"] += " --index-kpool 4"
    (tmp_path / "step-cost-kpool-h200-0.5.17.json").write_text(json.dumps(run))
    title, text, table = step_cost.section(tmp_path)[-3:]
    assert title == "## The metadata of a whole step, of a model with a pooled index, outside a server"
    assert "`python -m integration.gpu.step_cost --index-kpool 4`" in " ".join(text.split())
    assert "| 301.5 µs | 12.8 µs | 600.0 µs | 16.5 µs | 2,700.0 MB | 6.0 MB |" in table


def test_the_memory_of_page_tables_is_the_servers_own_line():
    found = {"requests": 64, "context": 1 << 20, "tables_mb": 37, "before_mb": 2_722,
             "gpu_mib": {"plugin": 5_628, "sglang": 8_216}}  # fmt: skip
    (text,) = servers.tables({"tables": found})
    assert "take 37 MB instead of 2,722 MB" in " ".join(text.split())


def test_copies_by_sglangs_code_are_counted():
    tool = {"copies_of_sglang": 26_554}
    text = gpu_checks.copies_of_sglang("initcheck", tool)
    assert text == "26,554 copies by SGLang's own code, under initcheck"


def ratio(median, low, high):
    return {"median": median, "low": low, "high": high}


def gained(load="16", **changes):
    """A cell of `sglang-nsa-plugin ab`."""
    cell = {
        "load": load, "rounds": 7, "step_ms": {"on": 9.0, "off": 10.0},
        "step_on_over_off": ratio(0.9, 0.88, 0.92), "step_off_over_off": ratio(1.001, 0.99, 1.01),
        "tokens_on_over_off": ratio(1.1, 1.05, 1.15),
        "resolved": True, "verdict": "with the plugin a step is 10.0% faster (8.0% to 12.0%)",
        "step_is": "median", "bound": None,
    }  # fmt: skip
    return cell | changes


EQUAL = gained("1", verdict="no difference beyond noise: on ÷ off 0.9 to 1.1, off ÷ off 0.9 to 1.1")
NOISY = gained(
    "64", resolved=False, verdict="not resolved: off ÷ off is 1.021, more than 2% from 1. Something else"
)
NOT_MEASURED = {
    "load": "256", "resolved": False, "verdict": "not resolved: the server takes 48: lower --requests",
    "bound": None,
}  # fmt: skip


OF = {"date": "2026-11-28T06:00:00+00:00", "commit": "0123456789", "gpus": ["NVIDIA H200, 580.1"]}


def regime(name, *cells, roles=("draft-extend",), beside=None, **more):
    """The parts of a result file that these cells are."""
    rest = {
        "of": OF,
        "settings": {"rounds": 7, "output_len": 96},
        "roles": list(roles),
        "check": 0,
        "variables": {},
        "wide_tables": "auto",
        "sglang": "0.5.17",
        **more,
    }
    return {
        f"{name}.{number}.{roles}.{beside}.{more}": {
            "regime": name,
            "beside": beside,
            "cell": cell,
            **rest,
        }
        for number, cell in enumerate(cells)
    }


def gain_shown(parts) -> str:
    return "\n\n".join(gain.section([{"parts": parts}])).replace("\n", " ")


def test_each_cell_of_a_regime_is_a_row():
    cells = (gained(), EQUAL, NOISY, NOT_MEASURED)
    blocks = gain.section([{"parts": regime("61-layers-1m-fp8", *cells)}])
    ratios = "0.900 (0.880 to 0.920) | 1.001 (0.990 to 1.010) | 1.100 (1.050 to 1.150)"
    why_not = "off ÷ off is 1.021, more than 2% from 1"
    name = "61 layers, context 1 M, FP8"
    assert blocks[2].splitlines()[2:] == [
        f"| {name} | 1 | 10.00 ms | - | {ratios} | no difference beyond noise |",
        f"| {name} | 16 | 10.00 ms | 1.00 ms | {ratios} | 10.0% faster (8.0% to 12.0%) |",
        f"| {name} | 64 | 10.00 ms | - | {ratios} | not resolved: {why_not} |",
        f"| {name} | 256 | - | - | - | - | - | not resolved: the server takes 48 |",
    ]


def test_many_differences_are_a_range():
    some = [gained(str(n), step_on_over_off=ratio(0.7 + n / 100, 0.7, 0.8)) for n in range(1, 5)]
    assert ": a difference in 4 of 4 cells: a step takes 0.710 to 0.740 of SGLang's." in gain_shown(
        regime("61-layers-1m-bf16", *some)
    )


def test_a_server_that_counts_no_tokens_has_no_rate():
    text = gain_shown(regime("2-layers-160k-bf16", gained(tokens_on_over_off=None)))
    assert "1.001 (0.990 to 1.010) | - | 10.0% faster" in text


def test_the_words_say_no_more_than_the_verdicts():
    text = gain_shown(
        regime("2-layers-160k-bf16", EQUAL, EQUAL, NOISY)
        | regime("61-layers-160k-bf16", EQUAL, note="another GPU was busy")
        | regime("61-layers-1m-bf16", gained(), NOT_MEASURED)
    )
    assert (
        "NVIDIA H200, driver 580.1, draft-extend filled, off: SGLang's fill without the wide page "
        "tables. Where the host bounds the step (2 layers): no difference beyond noise in 2 of 3 "
        "cells. 1 is not resolved. Where the GPU bounds it (61 thin layers of dummy weights): a "
        "difference in 1 of 3 cells: 61 layers, context 1 M, bfloat16, 16 at once, 10.0% faster (8.0% "
        "to 12.0%). No difference beyond noise in 1. 1 is not resolved."
    ) in text
    assert (
        "- 2 layers, context 160 k, bfloat16, 1, 1, 64 at once: commit 0123456, 2026-11-28, median "
        "steps, 7 rounds, 96 new tokens. - 61 layers, context 160 k, bfloat16, 1 at once: commit "
        "0123456, 2026-11-28, median steps, 7 rounds, 96 new tokens. Another GPU was busy. - 61"
    ) in text


def test_a_slower_step_is_a_difference():
    slower = gained(verdict="with the plugin a step is 3.0% slower (2.0% to 4.0%)")
    text = gain_shown(regime("2-layers-160k-bf16", slower))
    assert "a difference: 2 layers, context 160 k, bfloat16, 16 at once, 3.0% slower" in text


def test_cells_of_the_whole_step_stand_apart_with_their_bounds():
    """Those of draft-extend alone have none; a cell that is not resolved meets none."""
    whole = ("verify", "draft-extend", "draft-decode")
    bounds = [
        {"at_most": 0.76, "met": True},
        {"at_most": 1.0, "met": False},
        {"at_most": 1.0, "met": None},
    ]
    beside = (gained(bound=bounds[1]), NOISY | {"bound": bounds[2]}, gained("256"))
    parts = {
        **regime("61-layers-1m-bf16", *beside, roles=whole, beside="context", wide_tables="keep"),
        **regime("2-layers-160k-bf16", gained(bound=bounds[0]), roles=whole, wide_tables="keep"),
        **regime("2-layers-160k-bf16", EQUAL),
    }
    blocks = gain.section([{"parts": parts}])
    without = "draft-extend filled, off: SGLang's fill without the wide page tables. Where"
    assert without in blocks[1].replace("\n", " ")
    assert len(blocks[2].splitlines()) == 3
    assert "goal" not in blocks[2]
    what = "(draft-decode, draft-extend, verify) filled, off: exactly SGLang's own fill (`--nsa-metadata"
    assert what in blocks[4].replace("\n", " ")
    rows = blocks[5].splitlines()
    assert rows[0].endswith("| verdict | goal for the step |")
    assert [row.rsplit("| ", 1)[1] for row in rows[2:]] == [
        *("0.76: met |", "1.00: not met |", "1.00: not resolved |", "- |")
    ]
    assert "bfloat16, beside a process that holds a context | 64 |" in rows[4]


def test_the_cells_against_sglang_as_it_is_are_claimed_where_there_are_any():
    auto = regime("2-layers-160k-bf16", EQUAL)
    kept = regime("61-layers-1m-bf16", gained(), wide_tables="keep")
    beside = regime("61-layers-1m-bf16", gained("1"), wide_tables="keep", beside="context")
    (part,) = gain.claimed({**auto, **kept, **beside}, ["draft-extend"])
    assert part is next(iter(kept.values()))
    assert gain.claimed({**auto, **beside}, ["draft-extend"]) == list(auto.values())
    assert gain.claimed(auto, ["draft-extend"]) == list(auto.values())


def test_cells_with_a_shadow_check_stand_apart():
    checked = regime("2-layers-160k-bf16", gained(step_on_over_off=ratio(0.95, 0.9, 1.0)), check=1)
    blocks = gain.section([{"parts": {**checked, **regime("2-layers-160k-bf16", gained())}}])
    what = "SGLang's fill without the wide page tables, every fill shadow-checked. Where"
    assert [what in block.replace("\n", " ") for block in blocks] == [False] * 4 + [True, False, False]


def test_another_release_and_another_baseline_are_named():
    glue = {"SGLANG_ENABLE_METADATA_GLUE_GRAPH": "1"}
    text = gain_shown(
        regime("2-layers-160k-bf16", EQUAL, sglang="0.5.23")
        | regime("2-layers-160k-bf16", EQUAL, sglang="0.5.23", variables=glue)
    )
    assert text.count("(2 layers): no difference beyond noise.") == 2
    where = "draft-extend filled, off: SGLang's fill without the wide page tables. Where"
    assert f"580.1, SGLang 0.5.23, {where}" in text
    assert f"SGLang 0.5.23, SGLANG_ENABLE_METADATA_GLUE_GRAPH=1, {where}" in text


def test_the_first_minute_is_shown_beside_the_regimes():
    waits = {"pauses": 1_200, "longest_ms": [900.4, 80.0, 60.0, 5.0], "median_ms": 6.5}
    off, on = ({**waits, "over_100_ms": n, "at_once": 24, "seconds": 9.0 - n} for n in (1, 0))
    roles = ["draft-extend", "verify"]
    part = {"of": OF, "sglang": "0.5.17", "roles": roles, "off": off, "on": on}
    text = gain_shown({"first-minute.draft-extend+verify": part})
    assert "up to 24 at once" in text
    assert (
        "draft-extend, verify filled (NVIDIA H200, driver 580.1, SGLang 0.5.17, commit 0123456" in text
    )
    assert "| SGLang's own fill | 900, 80, 60 | 6.50 | 1 of 1,200 | 8.0 |" in text
    assert "| with the plugin | 900, 80, 60 | 6.50 | 0 of 1,200 | 9.0 |" in text


def test_every_gpu_that_was_measured_is_shown(monkeypatch, tmp_path):
    for gpu in ("h200", "h100-80gb-hbm3"):
        (tmp_path / f"gain-{gpu}-0.5.17.json").write_text("{}")
    (tmp_path / "gain-h200-0.5.12.json").write_text("{}")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert results_page._gain_files() == [
        *("gain-h100-80gb-hbm3-0.5.17.json", "gain-h200-0.5.17.json", "gain-h200-0.5.12.json")
    ]
    assert gain.section([]) == []


def test_the_switch_is_shown_with_what_every_rank_found():
    ranks = [
        {"replays": 2_000, "mismatches": 0, "roles": {"draft-extend": {}, "verify": {"mismatches": 2}}},
        {"replays": 2_001, "mismatches": 1, "roles": {"draft-extend": {}, "verify": {"mismatches": 0}}},
    ]
    parts = {
        "switch-tp2.tokens": {
            "prompts": 10,
            "switches": 700,
            "same": {"on": 9, "off": 10, "switching": 8},
        },
        "switch-tp2.load": {"requests": 204, "switches": 1_448, "ranks": ranks},
    }
    text = " ".join("".join(servers.switched(parts)).split())
    assert "SGLang's own fill: 9 on, 8 switching, with 700 switches in the middle" in text
    assert "1,448 switches in 204 requests: the 2 ranks ran 2,000 and 2,001 steps" in text
    assert "in which 3 values differed" in text
    assert servers.switched({}) == []


def test_the_steps_behind_no_ops_are_those_of_the_result_file():
    """The tables of docs/kernel.md, which are written by hand."""
    names = ("off again", "no-op", "8 no-ops", "forked graph")
    expect_the_table_of("programmatic-noop-8-h200.json", names)
    names = ("off again", "no-op before verify", "no-op", "8 no-ops")
    expect_the_table_of("programmatic-noop-plugin-h200.json", names)


def test_the_host_times_of_the_empty_kernel_are_those_of_the_result_files():
    """Another table of docs/kernel.md."""
    page = (ROOT / "docs" / "kernel.md").read_text()
    runs = [load("no-op-host-time-h200.json")["parts"][name] for name in ("launch", "query", "seldom")]
    served = [load(f"serve-0.5.{minor}.json")["parts"]["host_time"] for minor in (17, 18, 19, 21, 23)]
    runs += served
    for run in runs:
        us = run["median_us_by_role"]["plugin"]
        each = [us[role] for role in ("draft-decode", "verify", "draft-extend")]
        cells = " | ".join(f"{value:.1f}" for value in (*each, sum(each)))
        assert f" | {cells} |" in page
    assert all(f"({run['of']['commit']})" in page for run in runs)
    sglang = [f"{sum(run['median_us_by_role']['sglang'].values()):.0f}" for run in runs]
    assert f"took {', '.join(sglang[:-1])} and {sglang[-1]} µs" in page.replace("\n", " ")


def expect_the_table_of(file, names):
    rows = load(file)["rows"]
    page = (ROOT / "docs" / "kernel.md").read_text()
    assert {row["beside"] for row in rows} == {None, "context"}
    for row in rows:
        where = "beside a process that holds a context" if row["beside"] else "alone"
        many = "1 request" if row["requests"] == 1 else f"{row['requests']} requests"
        ratios = (f"{row[name]['ratio']['median']:.4f}" for name in names)
        cells = (f"{where}, {many}", f"{row['off']['step_us'] / 1000:.2f}", *ratios)
        assert f"| {' | '.join(cells)} |" in page
