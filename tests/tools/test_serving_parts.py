"""What the serving tests are made of, without a GPU: checkpoint, server fixture, comparison."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
import torch

from integration.serving import (
    ab_stats,
    checkpoint,
    compare,
    gain_cells,
    metrics_page,
    serve_test,
    test_corruption,
    test_dropped,
    test_first_minute,
    test_load,
    test_parallel,
)
from integration.serving.ab_servers import SHARED_GPU_ARGS, stop_all
from integration.serving.server import (
    Answer,
    Server,
    ServerError,
    changed_environment,
    free_ports,
)
from sglang_nsa_plugin import state

ROOT = Path(__file__).resolve().parent.parent.parent
SERVING = ROOT / "integration" / "serving"

# A stand-in for `sglang.launch_server`: it takes --port and answers as the fixture expects.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        BEFORE_ANSWER
        text = json.dumps({"output_ids": body["input_ids"], "meta_info": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
BEFORE_LISTENING
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(tmp_path: Path, before_listening: str = "", before_answer: str = "pass") -> Server:
    server = Server([], log_path=tmp_path / "server.log", name="stand-in")
    program = STAND_IN.replace("BEFORE_LISTENING", textwrap.dedent(before_listening))
    program = program.replace("BEFORE_ANSWER", before_answer)
    server.command = [sys.executable, "-c", program, "--port", str(server.port)]
    return server


def test_a_server_that_answers_late_is_waited_for(tmp_path):
    with stand_in(tmp_path, "time.sleep(1)") as server:
        server.wait_ready(limit_s=30)
        assert server.ready_after_s is not None
        assert server.ready_after_s > 1
        assert server.generate([4, 5], 1).output_ids == [4, 5]


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(tmp_path):
    dies = "print('out of paper', flush=True); sys.exit(7)"
    with stand_in(tmp_path, dies) as server, pytest.raises(ServerError) as error:
        server.wait_ready(limit_s=30)
    assert "server stand-in ended with exit code 7" in str(error.value)
    assert str(error.value).endswith("out of paper")


def test_a_server_that_never_listens_is_given_up(tmp_path):
    with stand_in(tmp_path, "time.sleep(60)") as server, pytest.raises(ServerError) as error:
        server.wait_ready(limit_s=1)
    assert "did not listen on port" in str(error.value)
    assert "within 1 s" in str(error.value)


def test_a_request_that_hangs_breaks_the_server_for_good(tmp_path):
    with stand_in(tmp_path, before_answer="time.sleep(30)") as server:
        while "listening" not in server.log():
            time.sleep(0.1)
        with pytest.raises(ServerError, match="did not answer POST /generate within 1 s"):
            server.generate([1], 1, limit_s=1)
        begin = time.monotonic()
        with pytest.raises(ServerError, match="is not asked again"):
            server.generate([1], 1)
        assert time.monotonic() - begin < 1


def test_a_server_that_ends_in_a_request_is_reported(tmp_path):
    with stand_in(tmp_path, before_answer="os._exit(3)") as server:
        while "listening" not in server.log():
            time.sleep(0.1)
        with pytest.raises(ServerError, match="broke off POST /generate"):
            server.generate([1], 1)


def test_the_whole_process_tree_is_ended_and_nothing_else(tmp_path):
    """A scheduler outlives its parent, and may ignore the signal that asks it to end."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    start = f"""
    child = subprocess.Popen([sys.executable, "-c", {stubborn!r}])
    other = subprocess.Popen([sys.executable, "-c", {stubborn!r}], start_new_session=True)
    print(json.dumps([child.pid, other.pid]), flush=True)
    """
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with stand_in(tmp_path, start) as server:
            server.wait_ready(limit_s=30)
            started = json.loads(server.log().splitlines()[0])
            assert all(psutil.pid_exists(pid) for pid in started)
        assert not any(is_running(pid) for pid in started)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_servers_of_a_fleet_end_side_by_side(tmp_path):
    slow = """
        def end(*_):
            time.sleep(2)
            os._exit(0)
        signal.signal(signal.SIGTERM, end)
    """
    servers = [stand_in(tmp_path / str(number), slow) for number in range(3)]
    for server in servers:
        server.start()
    for server in servers:
        server.wait_ready(20)
    begin = time.monotonic()
    stop_all(servers)
    assert time.monotonic() - begin < 5
    assert all(server.process is None for server in servers)


def test_ports_leave_room_for_the_one_that_sglang_derives():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port + 10_000 < 65_536 for port in ports)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("model"))


def test_the_checkpoint_is_the_same_each_time(model, tmp_path):
    again = checkpoint.write_checkpoint(tmp_path)
    names = sorted(path.name for path in model.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert [digest(again / name) for name in names] == [digest(model / name) for name in names]


def test_a_checkpoint_with_a_pooled_index_has_what_sglang_reads_of_it():
    """Three keys without a default, and two tensors of each indexer."""
    config, plain = checkpoint.model_config(index_kpool=4), checkpoint.model_config()
    assert {key: config[key] for key in config.keys() - plain.keys()} == {
        "index_kpool": 4,
        "index_kpool_compress": True,
        "index_kpool_always_select_tail": True,
    }
    weights = checkpoint.build_weights(index_kpool=4)
    added = weights.keys() - checkpoint.build_weights().keys()
    assert len(added) == 2 * 3  # two layers and the draft layer
    for name in added:
        is_gate = name.endswith("indexer.index_kpool_compress_gate")
        assert is_gate or name.endswith("indexer.index_kpool_compress_ape")
        assert weights[name].dtype == (torch.bfloat16 if is_gate else torch.float32)
        assert tuple(weights[name].shape) == ((128, 1024) if is_gate else (4, 128))


def test_the_attention_of_a_pooled_index_gets_columns_of_no_token(monkeypatch):
    monkeypatch.syspath_prepend(str(SERVING / "kpool_attention"))
    import kpool_attention

    def attention(backend, q_all, page_table_1, topk_length=None):
        return backend, page_table_1, topk_length

    table = torch.arange(2 * 2_051, dtype=torch.int32).view(2, 2_051)
    backend, wide, length = kpool_attention.widened(
        attention, "backend", "q", page_table_1=table, topk_length=5
    )
    assert (backend, length, wide.shape) == ("backend", 5, (2, 2_176))
    assert torch.equal(wide[:, :2_051], table)
    assert (wide[:, 2_051:] == kpool_attention.NO_TOKEN).all()
    assert kpool_attention.widened(attention, "backend", "q", table[:, :2_048])[1].shape == (2, 2_048)
    assert kpool_attention.as_asked(None, "backend", None, "flashmla_sparse") == "flashmla_sparse"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_checkpoint_loads_and_fits_its_config(model):
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    names: set[str] = set()
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
            for name in file.keys():  # noqa: SIM118 -- no mapping
                assert str(file.get_slice(name).get_dtype()) in ("BF16", "F32"), name
    layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    assert layers == set(range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]))
    assert sum(path.stat().st_size for path in model.glob("*.safetensors")) < 200 * 2**20


def test_sglangs_own_config_class_takes_the_checkpoint(model):
    """The config is of NSA/DSA sparse attention, with the geometry that its kernels accept."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(model), trust_remote_code=False)
    assert config.architectures == ["DeepseekV32ForCausalLM"]
    assert (config.index_topk, config.index_head_dim, config.index_n_heads) == (2048, 128, 64)


def answer(ids, histogram=(1, 2)):
    meta = {"spec_verify_ct": sum(histogram), "spec_accept_histogram": [*histogram, 0, 0]}
    return Answer(list(ids), 1.0, meta)


@pytest.mark.parametrize(
    ("ours", "same_ids", "same_drafts", "first"),
    [
        (answer([1, 2, 3]), True, True, None),
        (answer([1, 9, 3]), False, True, 1),
        (answer([1, 2, 3], (2, 2)), True, False, None),
    ],
)
def test_planted_differences_are_seen(ours, same_ids, same_drafts, first):
    row = compare.comparison(ours, answer([1, 2, 3]), length=10)
    assert (row["same_ids"], row["same_drafts"]) == (same_ids, same_drafts)
    assert row["first_different_token"] == first
    assert row["deterministic"]
    assert not compare.comparison(ours, answer([1, 2, 3]), length=2_048)["deterministic"]


@pytest.mark.parametrize("name", ["spec_accept_histogram", "spec_correct_drafts_histogram"])
def test_accepted_drafts_are_found_by_each_releases_name(name):
    found = Answer([1, 2], 1.0, {"spec_verify_ct": 2, name: [1, 1, 0]})
    assert found.histogram == [1, 1]


def test_accepted_drafts_without_a_known_name_are_an_error():
    """Two empty lists would be alike."""
    renamed = Answer([1, 2], 1.0, {"spec_verify_ct": 2, "spec_histogram": [1, 1]})
    with pytest.raises(ServerError, match=r"of 2 speculative steps it must have .*, got spec_histogram"):
        _ = renamed.histogram
    assert Answer([1], 1.0, {}).histogram == []  # not a step


def test_an_answer_of_another_length_is_a_difference():
    row = compare.comparison(answer([1, 2]), answer([1, 2, 3]), length=10)
    assert not row["same_ids"]
    assert row["first_different_token"] == 2
    assert compare.mismatches([row]) == [row]


def test_another_reason_to_finish_is_a_difference():
    ended = Answer([1, 2], 1.0, {"finish_reason": {"type": "stop", "matched": 2}})
    full = Answer([1, 2], 1.0, {"finish_reason": {"type": "length", "length": 2}})
    row = compare.comparison(ended, full, length=10)
    assert compare.mismatches([row]) == [row]
    assert compare.mismatches([compare.comparison(full, full, length=10)]) == []


def test_drafts_count_only_where_sglang_is_repeatable():
    ours, theirs = answer([1, 2, 3], (2, 2)), answer([1, 2, 3])
    assert compare.mismatches([compare.comparison(ours, theirs, length=10)]) != []
    assert compare.mismatches([compare.comparison(ours, theirs, length=2_048)]) == []


def test_a_batch_differs_where_no_answer_is_one_of_sglangs():
    a, b, c = answer([1]), answer([2]), answer([3])
    asked = [[7], [8], [9]]
    row = compare.repeated([[a, a, c], [a, b, c]], [[a, b, a], [a, b, a]], asked)
    assert (row["prompts"], row["repeatable"], row["different"]) == (3, 3, 1)
    assert row["differences"] == [
        {
            "prompt": [9],
            "verdict": "fault",
            "plugin": [{"times": 2, "output_ids": [3]}],
            "sglang": [{"times": 2, "output_ids": [1]}],
        }
    ]
    with pytest.raises(AssertionError):
        compare.assert_alike([row])
    explained = compare.repeated([[a, a, c], [a, b, c]], [[a, b, a], [a, b, b]], asked)
    assert (explained["repeatable"], explained["different"]) == (2, 1)
    assert explained["differences"][0]["verdict"] == "SGLang alone differs from itself"
    compare.assert_alike([explained])
    unrepeatable = compare.repeated([[a, a], [a, b]], [[a, a], [b, b]], asked[:2])
    with pytest.raises(AssertionError, match="0 of 2 prompts"):
        compare.assert_alike([unrepeatable])
    compare.assert_alike([compare.repeated([[a, b]], [[a, b]], asked[:2])])


@pytest.mark.parametrize(
    ("plugin", "sglang", "verdict"),
    [
        ([[1, 2, 9]], [[1, 2, 3], [1, 2, 3]], ab_stats.FAULT),
        ([[1, 2, 9]], [[1, 2, 3], [1, 2, 4]], ab_stats.ITSELF),
        ([[1, 9, 3]], [[1, 2, 3], [1, 2, 4]], ab_stats.FAULT),  # before SGLang's own answers part
        ([[1, 2, 4, 9]], [[1, 2, 3, 5], [1, 2, 4, 5]], ab_stats.ITSELF),  # and behind it
        ([[1, 2, 9], [8, 2, 3]], [[1, 2, 3], [1, 2, 4]], ab_stats.FAULT),  # one answer of two
    ],
)
def test_sglang_alone_explains_other_tokens_from_where_its_answers_part(plugin, sglang, verdict):
    assert ab_stats.verdict(plugin, sglang) == verdict


class Arm:
    """A server that gives these answers in turn, the last one ever after."""

    def __init__(self, *outputs):
        self.outputs = list(outputs)
        self.flushed = 0

    def generate(self, prompt, new_tokens):
        return answer(self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0])

    def flush_cache(self):
        self.flushed += 1


def test_other_tokens_are_kept_with_their_prompt_and_what_sglang_alone_says():
    servers = {"plugin": Arm([1, 2, 9]), "sglang": Arm([1, 2, 3], [1, 2, 3], [1, 2, 4])}
    (row,) = compare.one_at_a_time(servers, [[5, 6]])
    assert row["difference"]["prompt"] == [5, 6]
    assert row["difference"]["plugin"] == [{"times": 1, "output_ids": [1, 2, 9]}]
    assert row["difference"]["sglang"] == [
        {"times": 2, "output_ids": [1, 2, 3]},
        {"times": compare.REPEATS - 1, "output_ids": [1, 2, 4]},
    ]
    assert row["difference"]["verdict"] == "SGLang alone differs from itself"
    assert servers["sglang"].flushed == compare.REPEATS // 2
    assert compare.mismatches([row]) == compare.other_answers([row]) == []

    (row,) = compare.one_at_a_time({"plugin": Arm([1, 2, 9]), "sglang": Arm([1, 2, 3])}, [[5, 6]])
    assert row["difference"]["verdict"] == "fault"
    assert compare.mismatches([row]) == compare.other_answers([row]) == [row]


def test_alike_answers_are_not_asked_again():
    servers = {"plugin": Arm([1, 2, 3]), "sglang": Arm([1, 2, 3], [4])}
    (row,) = compare.one_at_a_time(servers, [[5, 6]])
    assert "difference" not in row
    assert servers["sglang"].outputs == [[4]]


def test_steps_are_counted_in_graphs_and_without():
    """Up to 0.5.14 draft-extend has no graph, and what is planned in graphs has to be named."""
    in_graphs = {"capture_bs": [2, 1], "replays": 7}
    eager = {"fills": 7, "roles": {"verify": in_graphs}}
    replayed, launched = {"captures": [1, 2], "replays": 7}, {"launches": 7}
    compare.check_steps("verify", replayed, in_graphs)
    compare.check_steps("draft-extend", launched, eager)
    for found, counted in ((launched | {"launches": 6}, eager), (replayed | {"replays": 6}, in_graphs)):
        with pytest.raises(AssertionError):
            compare.check_steps("a role", found, counted)
    assert not compare.is_filled(eager, "verify")
    assert compare.is_filled(eager, "draft-extend")
    assert compare.is_filled({**in_graphs, "roles": {"verify": in_graphs}}, "verify")
    assert not compare.is_filled({**in_graphs, "roles": {}}, "draft-decode")


@pytest.mark.parametrize("name", ["in_place", "captures", "reason"])
def test_ranks_that_decided_otherwise_are_told_apart(name):
    of_role = state.record()["roles"]["draft-extend"]
    first, other = ({"version": "1", "tree_mask": None, "roles": {"verify": of_role | change}}
                    for change in ({}, {name: "another"}))  # fmt: skip
    assert test_parallel.decided(first) == test_parallel.decided(dict(first))
    assert test_parallel.decided(first) != test_parallel.decided(other)


def test_tokens_of_a_step_and_how_far_apart():
    assert ab_stats.added([1, 2], [1, 0, 4]) == [2, 2, 4]
    assert ab_stats.mean_tokens([1, 0, 1]) == 2.0
    assert ab_stats.mean_tokens([]) == 0.0
    assert compare.relative(plugin=2.97, sglang=3.0) == 0.01


FIELDS = ("cache_seqlens_int32", "dsa_seqlens_expanded", "real_page_table")


@pytest.fixture
def corrupting(tmp_path, monkeypatch):
    """Makes a pair of SGLang's own backend class whose captured fill the CPU runs again at each replay;
    and says which tensors differ while the probe is asked to make some wrong."""
    from sglang_nsa_plugin.adapters import captured_fill, in_graph

    if not in_graph.is_generation() or torch.cuda.is_available():
        pytest.skip("needs the in-graph adapter on the CPU")
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.graph_pair import GraphPair

    monkeypatch.syspath_prepend(str(SERVING / "probe"))
    import nsa_probe

    refresh = captured_fill.BackendFills.refresh_derived
    monkeypatch.setattr(captured_fill.BackendFills, "refresh_derived", refresh)  # put back afterwards

    def make(names, role="draft-extend"):
        nsa_probe.Corruption(list(names), tmp_path).install()
        cpu = torch.device("cpu")
        pair = GraphPair(cpu, (2,), role=role, draft_tokens=4, context_len=512, pool_size=12)
        pair.inputs.seq_lens[:2] = 200
        pair.inputs.req_to_token.fill_(640)

        def different_when_asked_for(text):
            (tmp_path / "corrupt").write_text(text)
            done = tmp_path / "corrupted"
            while not done.is_file() or done.read_text() != text:
                time.sleep(0.05)
            result = Diff()
            pair.step(2, result)
            return {name for name, count in result.different.items() if count}

        return pair, different_when_asked_for

    return make


@pytest.mark.parametrize("role", ["draft-extend", "draft-decode", "verify"])
@pytest.mark.parametrize("wrong", FIELDS)
def test_the_probe_makes_one_tensor_wrong_while_it_is_asked_to(corrupting, role, wrong):
    """Draft-decode's lengths and expanded lengths are one tensor."""
    prefix = "" if role == "draft-extend" else f"{role}:"
    own = test_corruption.of(role, FIELDS)
    if wrong not in own:
        pytest.skip("not a tensor of its own there")
    _, different_when_asked_for = corrupting([prefix + field for field in own], role)
    different = different_when_asked_for(prefix + wrong) - {"ctx_lens"}
    also = {"cache_seqlens"} if role == "draft-decode" and wrong == "dsa_seqlens_expanded" else set()
    assert different == {field_of[wrong]} | also
    assert different_when_asked_for("") == set()


def test_the_probe_leaves_the_tensors_of_other_roles_alone(corrupting):
    _, different_when_asked_for = corrupting(["verify:real_page_table"])
    assert different_when_asked_for("verify:real_page_table") == set()


def test_the_probe_writes_minus_one_into_a_table(corrupting):
    name = "verify:page_table_1=-1"
    pair, different_when_asked_for = corrupting([name], "verify")
    assert different_when_asked_for(name) == {"page_table_1"}
    assert (pair.metadata(2).page_table_1 == -1).all()
    assert different_when_asked_for("") == set()


def test_a_table_that_was_left_out_gets_a_stand_in_of_minus_one(corrupting):
    import nsa_probe

    pair, _ = corrupting([])
    metadata = pair.metadata(2)
    object.__setattr__(metadata, "page_table_1", None)
    nsa_probe.give_stand_in(pair.fills(), metadata, "page_table_1")
    assert "draft-extend" in nsa_probe.STAND_INS
    assert metadata.page_table_1.shape == (2 * 4, pair.inputs.req_to_token.shape[1])
    assert (metadata.page_table_1 == -1).all()


class Graphs:
    """What a runner replays through, since 0.5.14."""

    def replay(self, key, batch):
        return batch


def test_the_probe_counts_replays_of_a_runner_and_times_its_metadata(monkeypatch):
    monkeypatch.syspath_prepend(str(SERVING / "probe"))
    import nsa_probe

    monkeypatch.setattr(nsa_probe.RoleWatch, "all", {})
    backend = SimpleNamespace(init_forward_metadata_out_graph=lambda batch: batch)
    runner = SimpleNamespace(capture_bs=[1, 2, 4], backend=Graphs())
    watch = nsa_probe.RoleWatch("draft-decode", runner, backend)
    for size in (1, 4, 4):
        assert backend.init_forward_metadata_out_graph("a batch") == "a batch"
        assert runner.backend.replay(SimpleNamespace(size=size), "an output") == "an output"
    found = watch.figures()
    assert found["capture_bs"] == [1, 2, 4]
    assert (found["replays"], found["replays_by_batch_size"]) == (3, {"1": 1, "4": 2})
    assert found["fill_us"]["count"] == 3
    assert nsa_probe.RoleWatch.all == {"draft-decode": watch}


def test_the_probe_hooks_what_sglang_has():
    """The names of the two runners, their graphs' backend and the attributes that the probe asks for."""
    import inspect

    spec = importlib.util.spec_from_file_location("probe", SERVING / "probe" / "nsa_probe.py")
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    if not probe._exists(probe.VERIFY_MODULE):
        pytest.skip("this SGLang has no such runners")
    for target, attribute in (
        (probe.VERIFY_RUNNER, "self.attn_backend"),
        (probe.DRAFT_RUNNER, "self.draft_attn_backend"),
    ):
        module, _, name = target.rpartition(".")
        source = inspect.getsource(getattr(importlib.import_module(module), name))
        for needed in (
            attribute,
            "self.capture_bs",
            "self.backend.replay(",
            "init_forward_metadata_out",
        ):
            assert needed in source, (target, needed)


def test_the_probe_can_do_the_least_that_a_hook_can(monkeypatch):
    """The captured fill runs at the replay all the same, so the values stay SGLang's."""
    from sglang_nsa_plugin.adapters import in_graph

    if not in_graph.is_generation() or torch.cuda.is_available():
        pytest.skip("needs the in-graph adapter on the CPU")
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.graph_pair import GraphPair
    from sglang_nsa_plugin.state import STATE

    monkeypatch.syspath_prepend(str(SERVING / "probe"))
    import nsa_probe

    pair = GraphPair(torch.device("cpu"), (2, 3), draft_tokens=4, context_len=512, pool_size=12)
    nsa_probe.do_the_least(pair.ours.backend)
    replays, result = STATE.replays, Diff()
    for bs in (3, 2):
        pair.inputs.seq_lens[:bs] = 100 * bs
        pair.step(bs, result)
        metadata = pair.ours.backend.decode_cuda_graph_metadata[bs]
        assert pair.ours.backend.forward_metadata is metadata
    assert result.first is None, result.first
    assert STATE.replays == replays  # the plugin was not called


field_of = {
    "cache_seqlens_int32": "cache_seqlens",
    "dsa_seqlens_expanded": "seqlens_expanded",
    "real_page_table": "real_page_table",
}


def slices(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The serving tests against stand-ins for SGLang's server and nvidia-smi."""
    (tmp_path / "state").mkdir(parents=True)
    stand_ins = str(Path(__file__).parent / "stand_in")
    env = {
        **os.environ,
        "PATH": os.pathsep.join([stand_ins, os.environ["PATH"]]),
        "PYTHONPATH": stand_ins,
        "STAND_IN_DIR": str(tmp_path / "state"),
        "NSA_RESULTS_DIR": str(tmp_path / "results"),
        "NSA_COMMIT": "none",
        **environment,
    }
    command = [sys.executable, "-m", "integration.serving.serve_test", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
    )


def failures(output: str) -> list[str]:
    """The names of the tests that pytest says failed, without their parameters."""
    lines = [line for line in output.splitlines() if line.startswith("FAILED integration/")]
    return [line.partition("::")[2].partition("[")[0] for line in lines]


def written(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "results").glob("serve-*.json")
    return json.loads(path.read_text())["parts"]


@pytest.mark.parametrize(
    ("names", "setups"),
    [
        (
            ("most",),
            {
                *("cases", "fp8", "width1-2", "width3-4", "width5-6"),
                *("no-graphs", "no-overlap", "sampling"),
            },
        ),
        (("corruption", "memory"), {"corruption", "memory"}),
        (("parallel", "load", "other-plugin"), {"tp2", "dp2", "load", "other-plugin"}),
        (
            ("roles", "dropped"),
            {"roles", "roles-checked", "roles-5-steps", *(each.name for each in test_dropped.SETUPS)},
        ),
        (("decode",), {"decode", "decode-checked", "decode-fp8"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_slices_run_alone_and_merge_into_one_file(tmp_path, names, setups):
    run = slices(tmp_path, *names, "--", "--load-s=3")
    assert run.returncode == 0, run.stdout[-3_000:]
    parts = written(tmp_path)
    assert {name.partition(".")[0] for name in parts} == setups
    assert len({part["of"]["commit"] for part in parts.values()}) == 1
    if "load" in names:
        assert parts["load"]["requests"]["plugin"]["answered"] > 48
    if "memory" in names:
        assert parts["memory.recapture"]["outcomes"] == dict.fromkeys(
            ("plugin", "sglang"), "ended while it captured"
        )
        assert parts["corruption.verify.real_page_table"]["caught_by"] == ["tokens", "accepted drafts"]
        assert parts["corruption.draft-decode.real_page_table"]["caught_by"] == ["accepted drafts"]


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_slice_that_needs_torch_memory_saver(tmp_path, is_installed):
    """Three ways to release memory, then the record; skipped with the reason where it is missing."""
    if is_installed:
        (tmp_path / "torch_memory_saver.py").touch()
    folders = os.pathsep.join([str(Path(__file__).parent / "stand_in"), str(tmp_path)])
    run = slices(tmp_path / "run", "memory-graphs", PYTHONPATH=folders)
    assert run.returncode == 0, run.stdout[-3_000:]
    assert ("8 passed" if is_installed else "8 skipped") in run.stdout
    assert ("needs torch_memory_saver" in run.stdout) != is_installed


@pytest.mark.parametrize(
    ("fault", "mismatches", "failed"),
    [("", 0, []), ("mismatch", 4, ["test_every_replay_was_checked_and_equal"] * 4)],
)
def test_the_shadow_checked_load_adds_up_its_servers(tmp_path, fault, mismatches, failed):
    run = slices(tmp_path, "shadow-load", "--", "-q", "--load-s=5", STAND_IN_FAULT=fault)
    (path,) = (tmp_path / "results").glob("shadow-load-*.json")
    parts = json.loads(path.read_text())["parts"]
    assert failures(run.stdout) == failed, run.stdout[-3_000:]
    assert run.returncode == bool(failed)
    assert list(parts["servers"]) == ["checked3", "checked4", "checked6", "checked4-fp8"]
    replays = [server["record"]["replays"] for server in parts["servers"].values()]
    assert parts["total"]["checks"] == sum(replays)
    assert parts["total"]["mismatches"] == mismatches


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("tokens", ["test_one_at_a_time", "test_many_at_once"]),
        ("drafts", ["test_one_at_a_time"]),
        ("fallback", ["test_record"]),
    ],
)
def test_a_wrong_plugin_fails_the_slice(tmp_path, fault, failed):
    run = slices(tmp_path, "fp8", "--", "-q", STAND_IN_FAULT=fault)
    assert run.returncode == 1
    assert "FAILED: fp8" in run.stdout
    assert failures(run.stdout) == failed
    assert "fp8.one_at_a_time" in written(tmp_path)  # figures before assertions


@pytest.mark.parametrize(
    ("fault", "failed"),
    [("fallback", ["test_record"] * 3), ("mismatch", ["test_record"] * 3)],
)
def test_a_role_whose_record_is_wrong_fails_the_slice(tmp_path, fault, failed):
    run = slices(
        tmp_path, "roles", "--", "-q", "-k", "record", STAND_IN_FAULT=fault, STAND_IN_ROLE="verify"
    )
    assert failures(run.stdout) == failed, run.stdout[-3_000:]


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("tokens", ["test_one_at_a_time", "test_many_at_once"]),
        ("fallback", ["test_record", "test_tokens_are_the_same_while_it_is_switched_off"]),
        ("mismatch", ["test_record", "test_tokens_are_the_same_while_it_is_switched_off"]),
    ],
)
def test_a_wrong_fill_of_plain_decode_fails_its_slice(tmp_path, fault, failed):
    run = slices(tmp_path, "decode", "--", "-q", "-k", "decode-fp8", STAND_IN_FAULT=fault)
    assert failures(run.stdout) == failed, run.stdout[-3_000:]


def test_an_unknown_slice_is_refused_with_the_choices(tmp_path):
    run = slices(tmp_path, "everything")
    assert run.returncode == 2
    assert "no slice named everything; there are core, replay" in run.stderr


def test_the_files_of_every_slice_exist():
    files = {word for words in serve_test.SLICES.values() for word in words if word.endswith(".py")}
    assert files == {path.name for path in SERVING.glob("test_*.py")}


def test_prompts_are_the_same_in_both_arms():
    assert compare.prompts([5, 9], seed=1) == compare.prompts([5, 9], seed=1)
    assert compare.prompts([5, 9], seed=1) != compare.prompts([5, 9], seed=2)
    assert max(max(p) for p in compare.prompts([500], seed=3)) < checkpoint.ORDINARY


def test_variables_are_set_and_removed(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    monkeypatch.setenv("PYTHONPATH", "here")
    changed = changed_environment({"SGLANG_PLUGINS": None, "NEW": "1"})
    assert "SGLANG_PLUGINS" not in changed
    assert changed["NEW"] == "1"
    assert changed["PYTHONPATH"] == os.path.abspath("here")


@pytest.mark.parametrize("value", [max, statistics.median_low])
def test_memory_that_grows_is_seen(value):
    samples = [{"plugin": 4_800 + 10 * i, "sglang": 4_700} for i in range(30)]
    assert [test_load.growth(samples, server, value) for server in ("plugin", "sglang")] == [100, 0]


@pytest.mark.parametrize(("moment", "greatest"), [(15, -5_900), (25, 5_900)])
def test_a_process_that_comes_and_goes_is_no_growth(moment, greatest):
    samples = [{"plugin": 4_700} for _ in range(30)]
    samples[moment]["plugin"] += 5_900
    assert test_load.growth(samples, "plugin", max) == greatest
    assert test_load.growth(samples, "plugin", statistics.median_low) == 0


def gain_parts(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "results").glob("gain-*.json")
    return json.loads(path.read_text())["parts"]


def test_each_cell_of_the_gain_is_kept_under_its_roles(tmp_path):
    """One server for the cells of a regime; a bound is reported, and not met is no failure."""
    roles = "draft-extend,draft-decode,verify"
    run = slices(tmp_path, "gain", "--", "-k", "61-layers-160k-bf16 and alone and not 256 and not 64",
                 f"--roles={roles}")  # fmt: skip
    assert run.returncode == 0, run.stdout[-3_000:]
    assert run.stdout.count("ready after") == 1
    parts = gain_parts(tmp_path)
    suffix = "draft-decode+draft-extend+verify"
    assert list(parts) == [
        f"61-layers-160k-bf16.{requests}.{suffix}.wide-tables-kept" for requests in (1, 4, 16)
    ]
    for part in parts.values():
        assert part["of"]["commit"] == "none"
        assert part["roles"] == roles.split(",")
        assert part["cell"]["step_is"] == "median"
        assert part["cell"]["bound"]["at_most"] == 1.0
    (tmp_path / "other").mkdir()
    run = slices(
        tmp_path / "other", "gain", "--", "-k", "2-layers-160k-bf16-1-alone", "--check=1",
        "--wide-tables=auto", f"--roles={roles}",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3_000:]
    (part,) = gain_parts(tmp_path / "other").items()
    assert part[0] == f"2-layers-160k-bf16.1.{suffix}.check-1"
    assert (part[1]["check"], part[1]["cell"]["bound"]) == (1, None)


def cell_of(layers=61, context="1m", requests=64, **more):
    return gain_cells.Cell(gain_cells.Regime(layers, context, (requests,), **more), requests)


def found(median, low=0.99, high=1.01, resolved=True):
    control = {"median": 1.0, "low": low, "high": high}
    return {"resolved": resolved, "step_on_over_off": {"median": median}, "step_off_over_off": control}


@pytest.mark.parametrize(
    ("cell", "measured", "bound"),
    [
        (cell_of(2, "160k", 1), found(0.76), {"at_most": 0.76, "with_noise": 0.76, "met": True}),
        (cell_of(2, "160k", 64), found(0.77), {"at_most": 0.76, "with_noise": 0.76, "met": False}),
        (cell_of(), found(0.86), {"at_most": 0.85, "with_noise": 0.85, "met": False}),
        (cell_of(), found(0.8, resolved=False), {"at_most": 0.85, "met": None}),
        (cell_of(requests=16), found(1.02, 0.98), {"at_most": 1.0, "with_noise": 1.02, "met": True}),
        (cell_of(requests=16), found(1.02), {"at_most": 1.0, "with_noise": 1.01, "met": False}),
        (cell_of(context="160k"), found(1.2), None),
        (cell_of(2, is_fp8=True), found(1.2), None),
        (cell_of(2, "160k", 256), found(1.2), None),
    ],
)
def test_a_bound_of_the_whole_step(cell, measured, bound):
    assert cell.bound(gain_cells.WHOLE_STEP, measured) == bound
    assert cell.bound(["draft-extend"], measured) is None


def test_cells_have_names_of_their_own():
    cells = [cell for regime in gain_cells.REGIMES for cell in regime.cells]
    for names in ([cell.name for cell in cells], [cell.part(["verify"]) for cell in cells]):
        assert len(set(names)) == len(cells)


def test_the_first_minute_is_read_while_others_join(tmp_path):
    run = slices(tmp_path, "first-minute", TRITON_CACHE_DIR=str(tmp_path / "none"))
    assert run.returncode == 0, run.stdout[-3_000:]
    (part,) = gain_parts(tmp_path).items()
    assert part[0] == "first-minute.draft-decode+draft-extend+verify"
    for arm in ("on", "off"):
        assert part[1][arm]["pauses"] == 24 * 40 - 1
        assert part[1][arm]["at_once"] == 24


def test_only_metadata_kernels_are_left_out_of_the_cache(tmp_path, monkeypatch):
    home = tmp_path / "home"
    for name in ("a/_fused_dsa_decode_metadata_kernel.json", "b/other.json"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home))
    copy = test_first_minute.cache_without_metadata_kernels(tmp_path / "copy")
    assert [path.name for path in copy.iterdir()] == ["b"]
    assert len(list(home.iterdir())) == 2


def test_sglangs_own_parser_takes_the_flags_of_every_setup():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    setups = [
        setup
        for path in SERVING.glob("test_*.py")
        if path.name not in ("test_gain.py", "test_first_minute.py")  # their servers come one by one
        for setup in importlib.import_module(f"integration.serving.{path.stem}").SETUPS
    ]
    assert len({setup.name for setup in setups}) == len(setups) > 10
    for setup in setups:
        parsed = parser.parse_args(["--model-path", "none", *setup.args])
        drafts = setup.draft_tokens or None  # None where the servers do not speculate
        assert parsed.speculative_num_draft_tokens == drafts
        assert parsed.speculative_num_steps == (drafts and drafts - 1)
        assert parsed.max_total_tokens == int(SHARED_GPU_ARGS[SHARED_GPU_ARGS.index("200000")])
        if "--mem-fraction-static" in setup.flags:
            own = setup.flags[setup.flags.index("--mem-fraction-static") + 1]
            assert parsed.mem_fraction_static == float(own), "the setup's own flag wins"
    for regime in gain_cells.REGIMES:
        parsed = parser.parse_args(["--model-path", "none", *regime.args])
        assert parsed.max_running_requests == max(regime.requests) == regime.requests[-1]
        tokens = int(regime.options[-1]) + 512
        assert regime.requests[-1] * tokens < parsed.max_total_tokens


# A scheduler's metrics, and what SGLang's HTTP process makes of those in the folder.
RANK = """
import json, sys
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from sglang_nsa_plugin import metrics, state
rank = int(sys.argv[1])
state.STATE.__init__(
    adapter="in-graph" if rank else None, backend="cuda" if rank else None,
    count=state.ReplayCount(1000 + rank), checks=7, mismatches=4,
    fallbacks=state.Counter({'a reason, "quoted"': 3, "another": 1}))
if rank:
    state.VERIFY_STATE.__init__("verify", reason="a choice", count=state.ReplayCount(50), checks=2,
                                fallbacks=state.Counter(another=7), in_place=True)
metrics.export({"model_name": "a model", "tp_rank": rank, "pp_rank": 0})
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(json.dumps([generate_latest(registry).decode(), state.record()]))
"""


def metrics_and_record(rank, folder):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", RANK, str(rank)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_metrics_are_separate_by_rank_and_agree_with_the_record(tmp_path):
    _, idle = metrics_and_record(0, tmp_path)
    text, record = metrics_and_record(1, tmp_path)
    shown = metrics_page.shown(text)
    assert set(shown) == {"pp_rank=0 tp_rank=0", "pp_rank=0 tp_rank=1"}
    assert shown["pp_rank=0 tp_rank=1"] == metrics_page.expected(record)
    assert shown["pp_rank=0 tp_rank=1"]["fallbacks"] == {'a reason, "quoted"': 3, "another": 1}
    assert shown["pp_rank=0 tp_rank=1"]["verify"]["replays"] == 50
    assert shown["pp_rank=0 tp_rank=1"]["verify"]["fallbacks"] == {"another": 7}
    assert shown["pp_rank=0 tp_rank=1"]["in_place"] == {"draft-extend": False, "verify": True}
    # a rank that the plugin leaves alone shows what runs and no counters
    assert shown["pp_rank=0 tp_rank=0"] == {
        "fallbacks": {},
        "in_place": {"draft-extend": False},
        "info": metrics_page.expected(idle)["info"],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replays", 5),
        ("checks", 5),
        ("fallbacks", {}),
        ("version", "0"),
        ("backend", "triton"),
        ("in_place", {}),
        ("roles", {}),
    ],
)
def test_a_metric_that_differs_from_the_record_is_seen(name, value, tmp_path):
    text, record = metrics_and_record(1, tmp_path)
    (shown,) = metrics_page.shown(text).values()
    assert shown != metrics_page.expected({**record, name: value})


def test_a_server_without_metrics_is_an_error(tmp_path):
    with stand_in(tmp_path) as server:
        server.wait_ready(limit_s=30)
        with pytest.raises(requests.HTTPError):
            metrics_page.read(server.url)
