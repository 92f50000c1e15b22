"""The metrics: what schedulers write, read as SGLang's HTTP process reads it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from isolated import run

# A scheduler whose constructor makes nothing but the collector's labels; the hooks around it are real.
SCHEDULER = """
import json, sys, threading, time
from types import SimpleNamespace
import sglang.srt.managers.scheduler as module

def make(self, server_args):
    from sglang_nsa_plugin.state import STATE
    if getattr(server_args, "implementation", None):
        STATE.backend = server_args.implementation  # as the capture of the graphs does
    if server_args.labels is not None:
        self.metrics_collector = SimpleNamespace(labels=server_args.labels)

module.Scheduler.__init__ = make
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_nsa_plugin import metrics
from sglang_nsa_plugin.state import STATE
module.Scheduler(SimpleNamespace(**json.loads(sys.argv[1])))
"""
SERVE = (
    SCHEDULER
    + """
metrics.PERIOD_S = 0.2
STATE.backend = "cuda"
for steps in (1000, 24):
    STATE.replays += steps
    STATE.checks += 3
    STATE.fallbacks["a reason"] += 1
    time.sleep(1.5)
"""
)
LEFT = (
    SCHEDULER
    + """
print(json.dumps({"imported": "prometheus_client" in sys.modules,
                  "threads": [thread.name for thread in threading.enumerate()]}))
"""
)
# SGLang's own route, asked as a client asks it.
READ = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.common import add_prometheus_middleware
app = FastAPI()
add_prometheus_middleware(app)
print(TestClient(app).get("/metrics").text)
"""
SPARSE = {"speculative_algorithm": "EAGLE", "attention_backend": "dsa"}


def labels(rank: int) -> dict[str, object]:
    """As SGLang labels a rank; dp_rank is there with data parallelism alone."""
    return {"model_name": "a model", "engine_type": "unified", "tp_rank": rank, "pp_rank": 0}


def succeed(program: str, **arguments: object) -> str:
    environment = {name: str(arguments.pop(name)) for name in list(arguments) if name.isupper()}
    done: subprocess.CompletedProcess[str] = run(program, json.dumps(arguments), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def samples(folder: Path) -> dict[str, float]:
    """Our lines of /metrics: the name with its labels, sorted, and the value."""
    found = {}
    for line in succeed(READ, PROMETHEUS_MULTIPROC_DIR=folder).splitlines():
        match = re.fullmatch(r"sglang_nsa_plugin:(\w+)\{(.*)\} (\S+)", line)
        if match:
            pairs = sorted(re.findall(r'(\w+)="([^"]*)"', match[2]))
            found[" ".join([match[1], *(f"{k}={v}" for k, v in pairs)])] = float(match[3])
    return found


def test_every_rank_shows_its_state_until_the_last_step(tmp_path):
    for rank in (0, 1):
        succeed(SERVE, **SPARSE, labels=labels(rank), PROMETHEUS_MULTIPROC_DIR=tmp_path)
    found = samples(tmp_path)
    for rank in (0, 1):
        of_rank = f"engine_type=unified model_name=a model pp_rank=0{{}} tp_rank={rank}"
        plain = of_rank.format("")
        assert found.pop(f"replays_total {plain}") == 1024
        assert found.pop(f"checks_total {plain}") == 6
        assert found.pop(f"launches_total {plain}") == 0
        assert found.pop(f"mismatches_total {plain}") == 0
        assert found.pop(f"fallbacks_total {of_rank.format(' reason=a reason')}") == 2
    assert len(found) == 2
    assert all(name.startswith("info ") for name in found)


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_info_names_version_adapter_and_implementation(tmp_path, implementation):
    arguments = {**SPARSE, "labels": labels(0), "implementation": implementation}
    succeed(SCHEDULER, **arguments, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    (info,) = (name for name in samples(tmp_path) if name.startswith("info "))
    assert re.match(r"info adapter=(in-graph|eager) ", info)
    assert re.search(rf" implementation={implementation or 'none'} .*version=\d+\.\d+\.\d+", info)


def test_a_server_that_the_plugin_leaves_alone_shows_that_and_no_counters(tmp_path):
    arguments = {"attention_backend": "fa3", "labels": labels(0)}
    assert threads_and_import(tmp_path, **arguments) == (["MainThread"], True)
    (info,) = samples(tmp_path).items()
    assert info[0].startswith("info adapter=none ")
    assert info[1] == 1


def test_nothing_exists_when_metrics_are_off(tmp_path):
    assert threads_and_import(tmp_path, **SPARSE, labels=None) == (["MainThread"], False)
    assert list(tmp_path.iterdir()) == []


def threads_and_import(folder: Path, **arguments: object) -> tuple[list[str], bool]:
    out = succeed(LEFT, **arguments, PROMETHEUS_MULTIPROC_DIR=folder)
    left = json.loads(out.strip().splitlines()[-1])
    return left["threads"], left["imported"]


def test_sglang_keeps_its_collector_and_labels_where_the_hook_looks():
    program = """
import inspect
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
scheduler = "".join(inspect.getsource(c) for c in Scheduler.__mro__ if c is not object)
print("self.metrics_collector = " in scheduler)
print("self.labels = labels" in inspect.getsource(SchedulerMetricsCollector))
"""
    assert succeed(program).split()[-2:] == ["True", "True"]
