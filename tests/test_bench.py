"""``bench``: what it prints and writes without a GPU, its sums, its original fill, its picture."""

from __future__ import annotations

import json

import pytest
import torch
from commands import command, program

from sglang_nsa_plugin import self_test
from sglang_nsa_plugin.cli.bench import baseline_059, cases, timing
from sglang_nsa_plugin.cli.bench.cases import BOTH, PAGED, Case, DirectFills
from sglang_nsa_plugin.harness.inputs import make_inputs
from sglang_nsa_plugin.kernels import torch as reference

CPU = torch.device("cpu")
NO_GPU = "no GPU: these are times of the CPU twin; they tell nothing about a GPU"
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
        for shown in (NO_GPU, "requests", "cpu", "torch", "page-64 table only", "0.5.9 Python"):
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
