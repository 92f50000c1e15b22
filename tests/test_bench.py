"""``bench``: what it prints and writes without a GPU, its sums, its original fill, its picture."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from commands import command, program
from conftest import ROOT

from sglang_nsa_plugin import self_test
from sglang_nsa_plugin.cli.bench import baseline_059, cases, timing
from sglang_nsa_plugin.cli.bench.cases import BOTH, PAGED, Case, DirectFills
from sglang_nsa_plugin.harness.inputs import make_inputs
from sglang_nsa_plugin.kernels import torch as reference

CPU = torch.device("cpu")
NO_GPU = "no GPU: these are CPU times of the pair, no GPU figure"
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, tests/gpu/test_gpu_bench.py covers the command"
)


@without_gpu
def test_without_a_gpu_it_times_the_twin_and_says_so(tmp_path):
    file = tmp_path / "bench.json"
    done = program("import sys; sys.modules['sglang'] = None", "bench", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(NO_GPU)
    assert "GPU µs" not in done.stdout
    result = json.loads(file.read_text())
    assert (result["gpu"], result["note"]) == (None, NO_GPU)
    tables = {BOTH: {"cpu", "torch", "original"}, PAGED: {"cpu", "torch"}}
    assert len(result["cases"]) == 2 * len(cases.ON_CPU.setups[0].cases())
    for row in result["cases"]:
        assert set(row["host_us"]) == tables[row["tables"]]
        assert row["values_compared"] > 0
        assert not any(name.startswith("gpu") for name in row)
        for path, (low, high) in row["host_quartiles"].items():
            assert low <= row["host_us"][path] <= high


@without_gpu
def test_builds_of_the_kernel_are_not_compared_without_a_gpu():
    command = [sys.executable, "-m", "integration.gpu.ab_kernels", "any.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "kernel_versions: needs an NVIDIA GPU, torch finds none\n"


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path):
    hidden = "import sys; sys.modules['matplotlib'] = None"
    done = program(hidden, "bench", "--plot", str(tmp_path / "bench.png"))
    assert done.returncode == 1
    assert done.stdout == ""  # nothing was timed
    assert "matplotlib" in done.stderr
    assert "pip install 'sglang-nsa-plugin[bench]'" in done.stderr


@without_gpu
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_shows_every_path(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, the extra bench")
    file = tmp_path / f"bench.{suffix}"
    done = command("bench", "--plot", str(file))
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 10_000
    if suffix == "svg":
        text = file.read_text()
        for shown in (NO_GPU, "requests", "cpu", "torch", "page-64 table only", "0.5.9's Python"):
            assert f"<!-- {shown}" in text or shown in text


@pytest.mark.parametrize(
    ("case", "draft_tokens", "tables", "read", "written"),
    [
        # one page: one sector, and 8 + 8 bytes; 1 cell in each of 2 rows, and 1 + 2 + 2 + 2 + 3 lengths
        (Case(1, 1), 2, PAGED, 32 + 16, 4 * (2 * 1 + 10)),
        # the same page in full
        (Case(1, 64), 2, PAGED, 32 + 16, 4 * (2 * 1 + 10)),
        # a token more: another page; its 65 slots lie in 9 sectors
        (Case(1, 65), 2, PAGED, 2 * 32 + 16, 4 * (2 * 2 + 10)),
        (Case(1, 65), 2, BOTH, 9 * 32 + 16, 4 * (2 * (65 + 2) + 10)),
        # each request reads its row once, whatever the draft tokens
        (Case(3, 65), 8, BOTH, 3 * (9 * 32 + 16), 4 * (24 * (65 + 2) + 3 + 4 + 24 + 24 + 25)),
    ],
)
def test_bytes_to_move(case, draft_tokens, tables, read, written):
    assert cases.bytes_to_move(case, draft_tokens, tables) == {"read": read, "written": written}


def test_512_requests_of_128k_move_some_50_mb():
    moved = cases.bytes_to_move(Case(512, 131_072), 4, PAGED)
    assert 45e6 < sum(moved.values()) < 55e6


@pytest.mark.parametrize("length", [63, 64, 200])
def test_the_original_fill_writes_what_the_reference_writes(length):
    inputs = make_inputs(CPU, 5, 6, 256, 64)
    cases.write_slots(inputs)
    cases.write_lengths(inputs, Case(5, length))
    args, expected = (DirectFills(inputs, 5, 4).args(5, BOTH) for _ in range(2))
    for output in (*args.outputs().values(), *expected.outputs().values()):
        output.fill_(self_test.POISON)
    reference.fill(expected)
    baseline_059.bind(args)()
    for name, output in args.outputs().items():
        assert torch.equal(output, expected.outputs()[name]), name


def test_slots_are_whole_pages_and_differ():
    inputs = make_inputs(CPU, 2, 3, 200, 64)
    cases.write_slots(inputs)
    slots = inputs.req_to_token[1:]
    assert (slots // 64)[:, :64].unique().numel() == 2
    assert torch.equal(slots % 64, (torch.arange(200, dtype=torch.int32) % 64).expand(2, -1))


def test_paths_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "HOST_ROUNDS", (2, 4))
    monkeypatch.setattr(timing, "HOST_CALLS", 3)
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = timing.host_times(calls, seconds=60.0)
    # one round to warm up, and in each round three calls behind one of their kind
    assert called == list("aaaabbbbcccc") * 5
    assert [len(samples[name]) for name in "abc"] == [4, 4, 4]


def test_a_host_time_is_the_median_of_calls_behind_one_that_is_not_counted(monkeypatch):
    monkeypatch.setattr(timing, "HOST_CALLS", 3)
    waits, ticks = [], iter([0, 90_000, 100_000, 107_000, 200_000, 203_000, 300_000, 305_000])
    monkeypatch.setattr(timing, "_wait", lambda: waits.append(True))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(ticks))
    assert timing._host_us(lambda: None) == 5.0
    assert len(waits) == 4  # the GPU is idle before each


def test_slow_paths_get_fewer_rounds_all_alike(monkeypatch):
    monkeypatch.setattr(timing, "HOST_ROUNDS", (2, 100))
    samples = timing.host_times({"slow": lambda: timing.time.sleep(0.01), "fast": lambda: None}, 0.0)
    assert [len(each) for each in samples.values()] == [2, 2]
    assert min(samples["slow"]) > 9_000 > max(samples["fast"])


def test_every_call_runs_before_the_first_graph_is_recorded(monkeypatch):
    """A graph keeps the memory of its calls: another call then needs as much again beside it."""
    done = []
    calls = {name: lambda name=name: done.append(name) for name in "ab"}
    monkeypatch.setattr(timing.torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(timing, "_record", lambda call, count, pool: done.append((count, pool)))
    monkeypatch.setattr(timing, "_slope_us", lambda one, many: 1.0)
    assert set(timing.gpu_times(calls, 0.0)) == {"a", "b"}
    assert done == ["a", "b", *[(1, "pool"), (timing.REPEATS, "pool")] * 2]


def test_spread_is_the_median_and_the_quartiles():
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 1000.0]) == {"median": 4.0, "q1": 2.0, "q3": 5.0}


def test_compiles_are_counted_by_package_and_only_inside():
    from triton import knobs
    from triton.runtime.jit import JitFunctionInfo

    def compiled(module: str) -> None:
        hook = knobs.runtime.jit_post_compile_hook
        hook(fn=JitFunctionInfo(module, "kernel", None), key="", repr="", compile={})

    assert knobs.runtime.jit_post_compile_hook is None
    with timing.counted_compiles() as counts:
        compiled("sglang_nsa_plugin.kernels.triton")
        compiled("sglang.kernels.ops.attention.dsa_metadata")
        compiled("sglang.kernels.ops.attention.dsa_metadata")
    assert counts == {"sglang_nsa_plugin": 1, "sglang": 2}
    assert knobs.runtime.jit_post_compile_hook is None


# README's table


def cell(tables, **changes):
    """A cell of the grid with figures that can be told apart."""
    kernels = {"sglang_kernel": 8.0, "cuda": 2.0 if tables == PAGED else 4.0}
    row = {
        "decode_impl": "flashmla_sparse", "requests": 8, "length": 2_048, "width": 163_904,
        "draft_tokens": 4, "tables": tables, "values_compared": 1_000,
        "host_us": {"sglang_kernel": 30.0, "cuda": 2.5}, "gpu_us": kernels,
        "copy_share": {"cuda": 0.125}, "compiles": {"sglang": 1, "ours": 0},
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


def test_readme_shows_the_cells_of_a_bench(tmp_path, bench_figures):
    path = committed(tmp_path)
    shown = bench_figures.figures(path)
    assert "| 8 | 2,048 | 210 | 3.2 | 2.5 | 16.0 | 6.0 | 8.0 | 4.0 | 12% | 8.0 | 2.0 |" in shown
    assert "at most 2 graph nodes with flashmla_sparse, beside the event" in shown
    assert "0.7 MB where SGLang's take 42.0" in shown
    assert "compiled 2 times and ours 0; 2,000 values were compared" in shown
    assert "4,096 GB/s" in shown
    assert "1.25 µs" in shown
    assert shown.endswith(
        "NVIDIA H200, driver 580.1, SGLang 0.5.17, torch 2.11.0, 2026-11-24, commit 0123456."
    )
    assert "![" not in shown
    path.with_suffix(".png").touch()
    assert "](integration/results/bench-h200-0.5.17.png)" in bench_figures.figures(path)


def test_every_figure_of_the_table_is_the_files(tmp_path, bench_figures):
    """Another number in the file makes another README."""
    before = bench_figures.figures(committed(tmp_path))
    for kind, path in (("host_us", "sglang"), ("host_us", "ours"), ("host_us", "cuda"),
                       ("gpu_us", "sglang"), ("gpu_us", "ours"), ("gpu_us", "cuda")):  # fmt: skip
        changed = cell(PAGED)
        changed[kind][path] += 7
        assert bench_figures.figures(committed(tmp_path, cases=[cell(BOTH), changed])) != before


def test_the_newest_bench_is_shown(tmp_path, bench_figures):
    assert bench_figures.newest(tmp_path) is None
    committed(tmp_path, "2026-11-20T00:00:00+00:00", "0.5.23")
    newest = committed(tmp_path, "2026-11-24T00:00:00+00:00", "0.5.17")
    only_dram = {"date": "2026-12-01T00:00:00+00:00", "parts": {"dram": {}}}
    (tmp_path / "bench-h200-0.5.22.json").write_text(json.dumps(only_dram))
    on_another = {"date": "2026-12-01T00:00:00+00:00", "parts": {"bench": {}}}
    (tmp_path / "bench-h100-0.5.17.json").write_text(json.dumps(on_another))
    assert bench_figures.newest(tmp_path) == newest


@pytest.fixture
def bench_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "integration")
    return importlib.import_module("bench_figures")


def test_the_bare_kernel_writes_the_pages_of_its_rows_and_nothing_else(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU the part bare of bench compares what it times")
    monkeypatch.syspath_prepend(ROOT / "integration")
    bare = importlib.import_module("bare")
    slots = torch.randint(2**30, (3, 1_000), dtype=torch.int32)
    pages = (slots[:, :777:64] // 64).repeat_interleave(4, dim=0)
    table = torch.empty((12, 16), dtype=torch.int32)
    launches = dict(bare.launches(slots, table, 777, 4, 64))
    assert len(launches) == len(bare.BLOCKS) * len(bare.WARPS)
    for name, launch in launches.items():
        table.fill_(-1)
        launch()
        assert table[:, :13].equal(pages), name
        assert (table[:, 13:] == -1).all(), name
