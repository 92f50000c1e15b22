"""What ``bench`` times beside SGLang's real backend, on the CPU: same values, every path, every figure.

Times are of no interest here, and what only a GPU can count is stood in for.
"""

from __future__ import annotations

import pytest
from cpu_pair import CPU, DRAFT_TOKENS, make_pair, on_the_cpu
from rich.console import Console

from sglang_nsa_plugin.adapters import supported
from sglang_nsa_plugin.cli.bench.cases import BOTH, PAGED, Case, DirectFills, Grid, Setup

pytestmark = on_the_cpu
LENGTH, REQUESTS = 200, 4
SETUP = Setup(width=640, requests=(1, REQUESTS), lengths=(LENGTH,), draft_tokens=DRAFT_TOKENS)


@pytest.fixture
def stepped():
    """A pair that has filled one case, direct fills over its inputs, and SGLang's values."""
    from sglang_nsa_plugin.cli.bench import cases, paths

    pair = make_pair(context_len=SETUP.width - cases.PAGE)
    fills = DirectFills(pair.inputs, REQUESTS, DRAFT_TOKENS)
    cases.write_slots(pair.inputs)
    case = Case(REQUESTS, LENGTH)
    cases.write_lengths(pair.inputs, case)
    assert paths.step(pair, REQUESTS) > 0
    return pair, fills, paths.sglang_values(pair, REQUESTS)


@pytest.mark.parametrize("tables", [BOTH, PAGED])
def test_every_path_writes_sglangs_values(stepped, tables):
    from sglang_nsa_plugin.cli.bench import paths

    pair, fills, sglang = stepped
    calls = paths.direct(fills, REQUESTS, tables)
    assert list(calls) == ["cpu", "torch", *(["original"] if tables == BOTH else [])]
    args = fills.args(REQUESTS, tables)
    values = paths.compare(calls, args, sglang)
    rows, pages = REQUESTS * DRAFT_TOKENS, -(-LENGTH // 64)
    lengths = REQUESTS + (REQUESTS + 1) + rows + rows + (rows + 1)
    cells = rows * (pages + (LENGTH if tables == BOTH else 0))
    assert values == len(calls) * (lengths + cells)
    timed = paths.with_sglang(pair, fills, REQUESTS, tables)
    assert "original" not in timed.gpu
    assert "sglang_kernel" in timed.gpu
    for path in (*timed.host.values(), *timed.gpu.values()):
        with pair.stub_process():
            path()
    recorded = paths.recorded_tables(pair, REQUESTS)
    assert ("ours" in timed.gpu) == ("sglang" in timed.host) == (tables == recorded)


@pytest.mark.parametrize(
    "name", ["cache_seqlens", "nsa_cu_seqlens_k", "page_table_1", "real_page_table"]
)
def test_a_wrong_value_is_named_and_not_timed(stepped, name):
    from sglang_nsa_plugin.cli.bench import paths

    _, fills, sglang = stepped
    args = fills.args(REQUESTS, BOTH)
    calls = paths.direct(fills, REQUESTS, BOTH)

    def wrong():
        calls["cpu"]()
        args.outputs()[name].view(-1)[-1 if name.endswith(("lens", "_k")) else 0] += 1

    with pytest.raises(paths.DifferentValuesError, match=rf"planted filled other values: {name}\["):
        paths.compare({"cpu": calls["cpu"], "planted": wrong}, args, sglang)


def test_the_kernel_of_sglang_leaves_the_wide_table_alone(stepped):
    pair, _, sglang = stepped
    for is_written in (True, False):
        sglang["page_table_1"].fill_(-7)
        sglang["real_page_table"].fill_(-7)
        with pair.stub_process():
            pair.sglang_kernel(REQUESTS, is_written)()
        assert bool((sglang["page_table_1"][:, :LENGTH] == -7).all()) != is_written
        assert (sglang["real_page_table"][:, 0] != -7).all()


def test_memory_counts_each_address_once(stepped):
    from sglang_nsa_plugin.cli.bench import paths

    pair, *_ = stepped
    metadata = pair.theirs.backend.decode_cuda_graph_metadata[REQUESTS]
    rows, width = metadata.page_table_1.shape
    counted = paths.memory_bytes(metadata)
    tables = 4 * rows * (width + metadata.real_page_table.shape[1])
    assert tables < counted < tables + 4 * 16 * rows + 64


def test_rows_of_a_setup_have_every_figure(stepped, monkeypatch):
    from sglang_nsa_plugin.cli.bench import report, timing
    from sglang_nsa_plugin.cli.bench import run as bench

    monkeypatch.setattr(timing, "gpu_times", timing.host_times)
    monkeypatch.setattr(timing, "launches", lambda call: 1)
    monkeypatch.setattr(timing, "graph_nodes", lambda call: {"kernel": 2, "event_record": 1})
    monkeypatch.setattr(timing, "HOST_ROUNDS", (3, 3))
    advanced: list[str] = []
    run = bench.Run(Grid((SETUP,), seconds=0.0), CPU, advanced.append)
    rows = bench._graph_setup(run, SETUP)
    assert [(row["requests"], row["tables"]) for row in rows] == [
        (1, BOTH), (1, PAGED), (REQUESTS, BOTH), (REQUESTS, PAGED),
    ]  # fmt: skip
    assert len(advanced) == 2
    for row in rows:
        row["copy_share"] = bench._copy_share(row, copy_gb_s=4000.0)
        paths = {"sglang_kernel", "cpu", "torch"} | ({"original"} if row["tables"] == BOTH else set())
        if "nodes" in row:
            paths |= {"sglang", "ours"}
            assert row["memory_bytes"]["sglang"] > 0
            assert row["host_over_sglang"]["ours"] == round(
                row["host_us"]["ours"] / row["host_us"]["sglang"], 4
            )
        assert set(row["host_us"]) == set(row["host_quartiles"]) == paths
        assert set(row["gpu_us"]) == set(row["gpu_quartiles"]) == paths - {"original"}
        assert set(row["copy_share"]) == {"sglang_kernel", "cpu", "torch"}
        assert row["compiles"] == {"sglang": 0, "ours": 0}  # the interpreter compiles nothing
    assert sum("nodes" in row for row in rows) == 2
    console = Console(record=True, width=160)
    figure = {"median": 1.0, "q1": 1.0, "q3": 1.0}
    about = {"sglang": "0", "gpu": "a GPU", "adapter": "in-graph", "implementation": "cpu"}
    measured = dict.fromkeys(("floor_us", "launch_us", "copy_gb_s"), figure)
    report.show(console, {**about, **measured, "cases": rows})
    shown = console.export_text()
    assert "plugin, in graph" in shown
    assert "2 kernel, 1 event_record" in shown


# --- the roles ---


@pytest.fixture
def timed_on_the_cpu(monkeypatch):
    from sglang_nsa_plugin.cli.bench import timing

    monkeypatch.setattr(timing, "gpu_times", timing.host_times)
    monkeypatch.setattr(timing, "graph_nodes", lambda call: (call(), {"kernel": 2})[1])
    monkeypatch.setattr(timing, "HOST_ROUNDS", (3, 3))


def test_every_role_has_a_row_with_every_figure(timed_on_the_cpu, state):
    from sglang_nsa_plugin.cli.bench import report, roles

    advanced: list[str] = []
    here = roles.measured_here()
    plain = [] if supported.why_no_decode_fence() else ["decode"]
    assert [role.name for role in here] == ["draft-decode", "verify", "draft-extend", *plain]
    rows = list(roles.rows(Grid((SETUP,), seconds=0.0), CPU, here, advanced.append))
    assert [(row["role"], row["requests"]) for row in rows] == [
        (role.name, requests) for role in here for requests in SETUP.requests
    ]
    assert len(advanced) == len(rows)
    for row in rows:
        for times in ("host_us", "gpu_us"):
            assert set(row[times]) == {"sglang", "ours"}
            assert min(row[times].values()) > 0
        assert row["launches"] == {"sglang": 2, "ours": 2}
        assert row["values_compared"] > LENGTH * row["requests"]
    decode, verify, extend, *of_plain = rows[1::2]
    # one row for a request, and n with n more tokens; the draft steps share what SGLang has for each
    assert 3.9 < extend["bytes"]["written"] / decode["bytes"]["written"] < 4.1
    assert [row["bytes"] for row in of_plain] == [decode["bytes"]] * len(plain)
    assert [row["draft_tokens"] for row in of_plain] == [1] * len(plain)
    assert verify["bytes"]["written"] - extend["bytes"]["written"] == 4 * REQUESTS * DRAFT_TOKENS**2
    assert decode["memory_bytes"]["sglang"] > 1.9 * decode["memory_bytes"]["ours"]
    assert verify["memory_bytes"]["sglang"] == verify["memory_bytes"]["ours"]  # the CPU drops no table
    console = Console(record=True, width=160)
    console.print(report._roles(rows))
    shown = console.export_text()
    assert all(role.name in shown for role in here)
    assert "SGLang / plugin; flashmla_sparse, req_to_token 640 wide, 4 draft tokens" in shown


def test_a_role_with_a_wrong_value_is_not_timed(timed_on_the_cpu, state, monkeypatch):
    from cpu_pair import plant_error

    from sglang_nsa_plugin.cli.bench import paths, roles

    plant_error("cu_seqlens_k", monkeypatch)
    (verify,) = (role for role in roles.measured_here() if role.name == "verify")
    with pytest.raises(paths.DifferentValuesError, match=r"not timed, .* cu_seqlens_k\[0\]"):
        list(roles.rows(Grid((SETUP,), seconds=0.0), CPU, [verify], lambda _: None))
