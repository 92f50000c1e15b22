"""docs/results.md and docs/releases.md show what the result files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from integration.figures import build, gpu_checks, one_fill, servers
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
    ours, theirs = (Answer([1, 2], 0.1, {"spec_accept_histogram": [1, 1]}) for _ in range(2))
    other = Answer([1, 3], 0.1, {"spec_accept_histogram": [1, 1]})
    rows = [compare.comparison(ours, theirs, 10), compare.comparison(other, theirs, 10)]
    many = compare.repeated([[ours, other]], [[theirs, theirs]])
    record = {"replays": 12, "fallbacks": {"a reason": 3}}
    parts = {
        "fp8.one_at_a_time": compare.summary(rows),
        "fp8.many_at_once": {"each": [many]},
        "fp8.record": {"record": record},
        "corruption.cu_seqlens_k": {"caught_by": []},
        "corruption.real_page_table": {"caught_by": ["tokens", "accepted drafts"]},
    }
    _, table, _, wrong = servers.section(parts)
    assert table.splitlines()[-1].endswith(" | 4 | 8 | 2 | 1.50 → 1.50 | 12 | 3 |")
    assert "| `real_page_table` | tokens and accepted drafts |" in wrong
    assert "| `cu_seqlens_k` | nothing: no consumer reads it |" in wrong
    assert servers.section({}) == []


def test_gpu_memory_that_falls_a_lot_hides_the_growth():
    assert servers.gpu_memory(12) == "GPU memory grew by 12 MiB in the last third"
    assert servers.gpu_memory(-8_617).endswith("the growth is unknown")


def test_copies_by_sglangs_code_are_counted():
    tool = {"copies_of_sglang": 26_554}
    text = gpu_checks.copies_of_sglang("initcheck", tool)
    assert text == "26,554 copies by SGLang's own code, under initcheck"
