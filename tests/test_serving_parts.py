"""What the serving tests are made of, without a GPU: checkpoint, server fixture, comparison."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs what SGLang brings: requests, psutil, safetensors")
INTEGRATION = Path(__file__).resolve().parent.parent / "integration"
sys.path.insert(0, str(INTEGRATION))

import checkpoint  # noqa: E402
import psutil  # noqa: E402
from server import Answer, Server, ServerError, free_ports, serve_args  # noqa: E402

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


def test_ports_leave_room_for_the_one_that_sglang_derives():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port + 10_000 < 65_536 for port in ports)


@pytest.mark.parametrize(
    ("release", "expected", "absent"),
    [
        ("0.5.12.post1", ["--nsa-decode-backend", "--disable-piecewise-cuda-graph"], "--dsa"),
        ("0.5.13.post1", ["--dsa-decode-backend", "--disable-piecewise-cuda-graph"], "--nsa"),
        ("0.5.14", ["--dsa-decode-backend", "--disable-prefill-cuda-graph"], "--nsa"),
    ],
)
def test_options_are_spelled_as_the_release_spells_them(monkeypatch, release, expected, absent):
    monkeypatch.setattr("server.version", lambda name: release)
    options = serve_args()
    assert set(expected) <= set(options)
    assert not any(option.startswith(absent) for option in options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.write_checkpoint(tmp_path_factory.mktemp("model"))


def test_the_checkpoint_is_the_same_each_time(model, tmp_path):
    again = checkpoint.write_checkpoint(tmp_path)
    names = sorted(path.name for path in model.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert [digest(again / name) for name in names] == [digest(model / name) for name in names]


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
    import test_serving

    row = test_serving.comparison(ours, answer([1, 2, 3]), length=10)
    assert (row["same_ids"], row["same_drafts"]) == (same_ids, same_drafts)
    assert row["first_different_token"] == first
    assert row["deterministic"]
    assert not test_serving.comparison(ours, answer([1, 2, 3]), length=2_048)["deterministic"]


def test_an_answer_of_another_length_is_an_error():
    import test_serving

    with pytest.raises(ValueError, match="zip"):
        test_serving.comparison(answer([1, 2]), answer([1, 2, 3]), length=10)


def test_prompts_are_the_same_in_both_arms():
    import test_serving

    assert test_serving.prompts([5, 9], seed=1) == test_serving.prompts([5, 9], seed=1)
    assert test_serving.prompts([5, 9], seed=1) != test_serving.prompts([5, 9], seed=2)
    assert max(max(p) for p in test_serving.prompts([500], seed=3)) < checkpoint.ORDINARY


def test_variables_are_set_and_removed(monkeypatch):
    from server import changed_environment

    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    monkeypatch.setenv("PYTHONPATH", "here")
    changed = changed_environment({"SGLANG_PLUGINS": None, "NEW": "1"})
    assert "SGLANG_PLUGINS" not in changed
    assert changed["NEW"] == "1"
    assert changed["PYTHONPATH"] == os.path.abspath("here")


# A scheduler's metrics, and what SGLang's HTTP process makes of those in the folder.
RANK = """
import json, sys
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from sglang_nsa_plugin import metrics, state
rank = int(sys.argv[1])
state.STATE = metrics.STATE = state.State(
    adapter="in-graph" if rank else None, backend="cuda" if rank else None, replays=1000 + rank,
    checks=7, mismatches=4, fallbacks=state.Counter({'a reason, "quoted"': 3, "another": 1}))
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


def test_metrics_are_told_apart_by_rank_and_agree_with_the_record(tmp_path):
    import exposition

    _, idle = metrics_and_record(0, tmp_path)
    text, record = metrics_and_record(1, tmp_path)
    shown = exposition.shown(text)
    assert set(shown) == {"pp_rank=0 tp_rank=0", "pp_rank=0 tp_rank=1"}
    assert shown["pp_rank=0 tp_rank=1"] == exposition.expected(record)
    assert shown["pp_rank=0 tp_rank=1"]["fallbacks"] == {'a reason, "quoted"': 3, "another": 1}
    # a rank that the plugin leaves alone shows what runs and no counters
    assert shown["pp_rank=0 tp_rank=0"] == {
        "fallbacks": {},
        "info": exposition.expected(idle)["info"],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("replays", 5), ("checks", 5), ("fallbacks", {}), ("version", "0"), ("backend", "triton")],
)
def test_a_metric_that_differs_from_the_record_is_seen(name, value, tmp_path):
    import exposition

    text, record = metrics_and_record(1, tmp_path)
    (shown,) = exposition.shown(text).values()
    assert shown != exposition.expected({**record, name: value})


def test_a_server_without_metrics_is_an_error(tmp_path):
    import exposition
    import requests

    with stand_in(tmp_path) as server:
        server.wait_ready(limit_s=30)
        with pytest.raises(requests.HTTPError):
            exposition.read(server.url)
