"""The metrics: what schedulers write, read as SGLang's HTTP process reads it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cpu_pair import skip_unless_captured
from isolated import run

from sglang_nsa_plugin.adapters.fallbacks import FallbackReason

# A scheduler whose constructor makes nothing but the collector's labels; the hooks around it are real.
SCHEDULER = """
import json, sys, threading, time
from types import SimpleNamespace
import sglang.srt.managers.scheduler as module

def make(self, server_args):
    if getattr(server_args, "implementation", None) is not None:
        # as the draft worker in a scheduler's constructor makes it
        import torch
        from sglang_nsa_plugin.harness.installed import pair_for_installed
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        pair_for_installed(device, [1], server_args.implementation, context_len=256, pool_size=4)
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
    STATE.count.replays += steps
    STATE.checks += 3
    STATE.switched_on = False
    STATE.fallbacks["a reason"] += 1
    time.sleep(1.5)
"""
)
# Somebody has registered a metric of our name; then copies fail for a while, as on a full disk.
FAILS_AT_START = SCHEDULER.replace(
    "module.Scheduler(S",
    """import prometheus_client
prometheus_client.Gauge("sglang_nsa_plugin:info", "another's", ["rank"])
module.Scheduler(S""",
)
FAILS_LATER = (
    SCHEDULER
    + """
metrics.PERIOD_S = 0.1
inc = metrics.Copier._raise
metrics.Copier._raise = lambda *_: 1 / 0
STATE.count.replays += 5
time.sleep(2)
metrics.Copier._raise = inc
STATE.count.replays += 5
time.sleep(1)
"""
)
ERRORS = """
import logging, sys
logging.basicConfig(level=logging.ERROR, stream=sys.stdout, format="%(message)s")
"""
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
SPARSE = {
    "speculative_algorithm": "EAGLE",
    "attention_backend": "dsa",
    "SGLANG_NSA_METADATA_ROLES": "draft-extend",  # the only backend that the scheduler here makes
}


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
        served = {**SPARSE, "implementation": "torch", "labels": labels(rank)}
        succeed(SERVE, **served, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    found = samples(tmp_path)
    for rank in (0, 1):
        of_rank = f"engine_type=unified model_name=a model pp_rank=0{{}} tp_rank={rank}"
        plain = of_rank.format(" role=draft-extend")
        assert found.pop(f"replays_total {plain}") == 1024
        assert found.pop(f"checks_total {plain}") == 6
        assert found.pop(f"launches_total {plain}") == 0
        assert found.pop(f"mismatches_total {plain}") == 0
        assert found.pop(f"switched_on {plain}") == 0
        assert found.pop(f"fallbacks_total {of_rank.format(' reason=a reason role=draft-extend')}") == 2
        assert found.pop(f"in_place {of_rank.format(' role=draft-extend')}") == 1
    assert len(found) == 2
    assert all(name.startswith("info ") for name in found)


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_info_names_version_adapter_and_implementation(tmp_path, implementation):
    """An implementation where the scheduler has made a draft-extend backend."""
    arguments = {**SPARSE, "implementation": implementation, "labels": labels(0)}
    succeed(SCHEDULER, **arguments, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    (info,) = (name for name in samples(tmp_path) if name.startswith("info "))
    adapter = "none" if implementation is None else "(in-graph|eager)"
    assert re.match(f"info adapter={adapter} ", info)
    assert f" implementation={implementation or 'none'} " in info
    assert re.search(r" version=\d+\.\d+\.\d+", info)


@pytest.mark.parametrize(
    "arguments",
    [
        {**SPARSE, "attention_backend": "fa3"},
        {**SPARSE, "speculative_algorithm": None},
        {**SPARSE, "disaggregation_mode": "prefill"},
        {**SPARSE, "SGLANG_NSA_METADATA_BACKEND": "off"},
        {**SPARSE, "speculative_draft_attention_backend": "fa3"},
    ],
    ids=["other attention", "no speculation", "prefill", "off", "other attention of the draft model"],
)
def test_a_server_that_the_plugin_leaves_alone_shows_that_and_nothing_else(tmp_path, arguments):
    """An `in_place` of 0 would set off the alert for a server that is as somebody wants it."""
    assert threads_and_import(tmp_path, **arguments, labels=labels(0)) == (["MainThread"], True)
    (info,) = found = samples(tmp_path)
    assert info.startswith("info adapter=none ")
    assert found[info] == 1


@pytest.mark.parametrize(
    ("roles", "shown"), [("verify", ["verify"]), ("draft-extend,verify", ["draft-extend", "verify"])]
)
def test_in_place_is_shown_of_the_roles_alone_that_the_server_names(tmp_path, roles, shown):
    """Else the alert would tell of a role that nobody wants filled."""
    arguments = {**SPARSE, "SGLANG_NSA_METADATA_ROLES": roles, "labels": labels(0)}
    succeed(SCHEDULER, **arguments, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    of_role = {
        re.search(r" role=(\S+)", name)[1]: value
        for name, value in samples(tmp_path).items()
        if name.startswith("in_place ")
    }
    assert of_role == dict.fromkeys(shown, 0)


def test_a_pipeline_stage_without_the_draft_model_shows_no_in_place_of_it(tmp_path):
    skip_unless_captured()
    without = SCHEDULER.replace(
        "def make(self, server_args):", "def make(self, server_args):\n    self.draft_worker = None"
    )
    arguments = {**SPARSE, "SGLANG_NSA_METADATA_ROLES": "draft-extend,draft-decode", "labels": labels(0)}
    succeed(without, **arguments, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    assert [name for name in samples(tmp_path) if name.startswith("in_place ")] == []


def test_nothing_exists_when_metrics_are_off(tmp_path):
    assert threads_and_import(tmp_path, **SPARSE, labels=None) == (["MainThread"], False)
    assert list(tmp_path.iterdir()) == []


def threads_and_import(folder: Path, **arguments: object) -> tuple[list[str], bool]:
    out = succeed(LEFT, **arguments, PROMETHEUS_MULTIPROC_DIR=folder)
    left = json.loads(out.strip().splitlines()[-1])
    return left["threads"], left["imported"]


@pytest.mark.parametrize(
    ("program", "lost", "replays"),
    [
        (FAILS_AT_START, "its part of /metrics is lost: ", None),
        (FAILS_LATER, "a copy of the counters to /metrics is lost: ZeroDivisionError", 10),
    ],
    ids=["at start", "later"],
)
def test_metrics_that_fail_are_lost_and_nothing_else(program, lost, replays, tmp_path):
    served = {"implementation": "torch", "labels": labels(0)}
    arguments = {**SPARSE, **served, "PROMETHEUS_MULTIPROC_DIR": tmp_path}
    assert succeed(f"{ERRORS}{program}", **arguments).count(lost) == 1
    found = [value for name, value in samples(tmp_path).items() if name.startswith("replays_total ")]
    assert found == ([] if replays is None else [replays])


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


def test_the_reasons_of_fallbacks_are_the_public_values_of_a_label():
    """Dashboards and alerts of operators match them: changing one is a change for users."""
    assert {reason.value for reason in FallbackReason} == {
        "input tensors are not the captured ones",
        "the shadow check found a difference",
        "switched off in service",
        "the batch has no requests",
        "the batch has no sequence lengths on the host",
        "the batch's tensors have other sizes than its number of requests",
        "requests do not extend by the number of draft tokens each",
        "the captured page table and lengths have different numbers of rows",
        "SGLang passed arguments that the plugin does not know",
    }


def test_a_fallback_is_counted_under_its_label_value_as_a_plain_string(state):
    """It travels to SGLang's other processes, and from there as JSON."""
    from sglang_nsa_plugin.adapters.fallbacks import count_fallback

    count_fallback(FallbackReason.NO_REQUESTS)
    ((reason, count),) = state.fallbacks.items()
    assert (type(reason), reason, count) == (str, "the batch has no requests", 1)
