"""How integration/serving/trace.py reads a profile, by one that is written here."""

from __future__ import annotations

import gzip
import importlib.util
import threading
import time
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from integration.serving import test_profile, trace


def call(correlation, at, name="cudaLaunchKernel", category="cuda_runtime"):
    return {"cat": category, "name": name, "ts": at, "dur": 1.0, "args": {"correlation": correlation}}


def operation(correlation, name, category="kernel"):
    return {"cat": category, "name": name, "ts": 900.0, "dur": 2.5, "args": {"correlation": correlation}}


def mark(role, begin, end, category="user_annotation"):
    return {"cat": category, "name": trace.MARK + role, "ts": begin, "dur": end - begin}


EVENTS = [
    {"ph": "M", "name": "process_name"},  # no category, as in any trace
    mark("verify", 100.0, 200.0),
    mark("draft-decode", 300.0, 400.0),
    mark("draft-decode", 500.0, 600.0),
    mark("draft-decode", 500.0, 600.0, "gpu_user_annotation"),  # the same, on the GPU's time line
    call(1, 110.0),
    operation(1, "_fused_dsa_target_verify_metadata_kernel"),
    call(2, 199.0, "cuLaunchKernelEx", "cuda_driver"),
    operation(2, "topk_plan"),
    call(3, 150.0, "cudaMemcpyAsync"),
    operation(3, "Memcpy DtoD", "gpu_memcpy"),
    call(4, 160.0, "cudaEventRecord"),  # launches nothing
    call(5, 250.0, "cudaGraphLaunch"),
    operation(5, "a node"),
    operation(5, "fused_metadata_copy_kernel"),
    call(6, 450.0),
    operation(6, "void fused_metadata_copy_kernel<0>"),  # between two marks
    call(7, 460.0),
    operation(7, "some other kernel"),
]


def test_operations_are_counted_for_the_mark_that_they_were_launched_in():
    found = trace.metadata_launches(EVENTS)
    assert found["graph_launches"] == 1
    assert found["roles"]["verify"] == {
        "calls": 1,
        "launches": 3,
        "operations": {
            "_fused_dsa_target_verify_metadata_kernel": 1,
            "topk_plan": 1,
            "Memcpy DtoD": 1,
        },
        "gpu_us": 7.5,
    }
    nothing = {"launches": 0, "operations": {}, "gpu_us": 0.0}
    assert found["roles"]["draft-decode"] == {"calls": 2, **nothing}
    assert found["unmarked"] == {"void fused_metadata_copy_kernel<0>": 1}


def test_a_trace_counts_once_it_is_complete(tmp_path):
    assert trace.read(tmp_path) is None
    file = tmp_path / "1-TP-0.trace.json.gz"
    whole = gzip.compress(dumps({"traceEvents": EVENTS}).encode())
    for so_far in (b"", whole[:40], whole[:-9]):
        file.write_bytes(so_far)
        assert trace.read(tmp_path) is None
    file.write_bytes(whole)
    assert trace.read(tmp_path) == EVENTS


class Profiling:
    """A server that decodes and writes a profile a moment after it was asked to."""

    name = "profiling"

    def generate_batch(self, asked, new_tokens, limit_s):
        time.sleep(0.2)

    def send(self, method, path, limit_s, json):
        self.asked = (method, path, json)
        text = dumps({"traceEvents": EVENTS}).encode()
        file = Path(json["output_dir"]) / "1-TP-0.trace.json.gz"
        threading.Timer(0.1, file.write_bytes, [gzip.compress(text)]).start()
        return SimpleNamespace(ok=True)


def test_a_profile_is_asked_for_while_requests_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(test_profile, "DECODING_S", 0.1)
    server = Profiling()
    found = test_profile.profiled(server, tmp_path / "of-a-server", 2)
    assert found == trace.metadata_launches(EVENTS)
    method, path, body = server.asked
    assert (method, path, body["num_steps"]) == ("POST", "/start_profile", test_profile.STEPS)


def test_sglang_takes_what_a_profile_is_asked_for_with():
    from sglang.srt.managers.io_struct import ProfileReq

    folder = {"output_dir": "/tmp", "num_steps": test_profile.STEPS}
    assert ProfileReq(**test_profile.RECORDED, **folder).activities == ["CPU", "GPU"]


@pytest.mark.parametrize("at", [100.0, 150.0, 200.0, 300.0])
def test_a_moment_inside_a_span(at):
    assert trace.is_inside(at, [(100.0, 200.0), (300.0, 400.0)])


@pytest.mark.parametrize("at", [99.0, 201.0, 401.0])
def test_a_moment_outside_all_spans(at):
    assert not trace.is_inside(at, [(100.0, 200.0), (300.0, 400.0)])


def test_the_probe_names_its_calls_in_a_real_profile(tmp_path, monkeypatch):
    """As PyTorch writes it; without the variable the call is the one that it was given."""
    path = Path(trace.__file__).parent / "probe" / "nsa_probe.py"
    spec = importlib.util.spec_from_file_location("probe", path)
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)

    def fill():
        return torch.ones(3).sum()

    monkeypatch.delenv("NSA_PROBE_MARK", raising=False)
    assert probe.marked("verify", fill) is fill
    monkeypatch.setenv("NSA_PROBE_MARK", "1")
    with torch.profiler.profile() as profile:
        assert probe.marked("verify", fill)() == 3
    profile.export_chrome_trace(str(tmp_path / "1.trace.json.gz"))
    found = trace.metadata_launches(trace.read(tmp_path))
    assert found["roles"] == {"verify": {"calls": 1, "launches": 0, "operations": {}, "gpu_us": 0.0}}
