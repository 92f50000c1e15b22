"""Versions are read once: what happens to dist-info afterwards reaches no hook of a running server."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
from pathlib import Path

import prometheus_client
import pytest
from isolated import run, run_fresh

import sglang_nsa_plugin
from sglang_nsa_plugin import metrics
from sglang_nsa_plugin.adapters import outcome, releases
from sglang_nsa_plugin.state import record

PACKAGE = Path(sglang_nsa_plugin.__file__).parent
LABELS = {"rank": "0", "adapter": "none", "implementation": "none"}


class Difference:
    """What a shadow check found, in words."""

    count = 1

    def __str__(self) -> str:
        return "ours 1, theirs 2"


def _removed(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)


class _Upgraded:
    version = "99.0"


@pytest.mark.parametrize("read", [_removed, lambda name: _Upgraded()], ids=["removed", "upgraded"])
def test_a_running_process_keeps_its_versions(read, state, monkeypatch, caplog):
    before = outcome.VERSION, outcome.SGLANG
    monkeypatch.setattr(importlib.metadata, "distribution", read)
    registry = prometheus_client.CollectorRegistry()
    gauge = functools.partial(prometheus_client.Gauge, registry=registry)
    monkeypatch.setattr(prometheus_client, "Gauge", gauge)
    caplog.set_level(logging.INFO, "sglang.nsa_plugin")
    mine = outcome.Outcome()
    mine.report_idle("no kernel")
    mine.fail(Difference())
    metrics._expose_info({"rank": 0})
    assert registry.get_sample_value(f"{metrics.PREFIX}info", LABELS | {"version": before[0]}) == 1
    assert record()["version"] == before[0]
    assert all(f"sglang-nsa-plugin {before[0]}: " in line for line in caplog.messages)
    assert f"SGLang {before[1]}, " in caplog.messages[-1]
    assert "99.0" not in caplog.text


# A process that finds no dist-info at all, of SGLang as a source tree: a module with a version, or none.
WITHOUT_DIST_INFO = """
import importlib.metadata, sys, types

def removed(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.distribution = removed
sglang = types.ModuleType("sglang")
{sglang}
sys.modules["sglang"] = sglang
from sglang_nsa_plugin import state
from sglang_nsa_plugin.adapters import releases
print(state.record()["version"], releases.SGLANG)
"""


@pytest.mark.parametrize(
    ("sglang", "printed"),
    [("sglang.__version__ = '0.5.23+tree'", "unknown 0.5.23+tree"), ("", "unknown unknown")],
)
def test_without_dist_info_the_loaded_sglang_or_a_word_is_named(sglang, printed):
    done = run_fresh(WITHOUT_DIST_INFO.format(sglang=sglang))
    assert (done.stdout.strip(), done.returncode) == (printed, 0), done.stderr


def test_the_loaded_sglang_is_named_rather_than_one_on_disk(monkeypatch):
    sglang = type("sglang", (), {"__version__": "0.5.99"})
    monkeypatch.setitem(releases.sys.modules, "sglang", sglang)
    assert releases._running() == "0.5.99"


# The same for a server's start and its record.
SERVES_WITHOUT_DIST_INFO = """
import importlib.metadata, json

distribution = importlib.metadata.distribution

def removed(name):
    if name in ("sglang", "sglang-nsa-plugin"):
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)

import sglang
importlib.metadata.distribution = removed
{sglang}
from types import SimpleNamespace
from sglang_nsa_plugin import plugin
from sglang_nsa_plugin.kernels import library
from sglang_nsa_plugin.state import record
plugin.activate(SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="dsa"))
output = plugin._get_internal_state(lambda _: SimpleNamespace(internal_state={{}}), None)
shown = output.internal_state["nsa_metadata"]
print(json.dumps([str(library.LIBRARY), shown["version"], shown["adapter"]]))
"""


@pytest.mark.parametrize("sglang", ["", "del sglang.__version__"])
def test_a_server_starts_and_reports_without_dist_info(sglang):
    """The library is looked for beside the package then, where a copied folder has it."""
    done = run(SERVES_WITHOUT_DIST_INFO.format(sglang=sglang))
    assert done.returncode == 0, done.stderr
    library, version, adapter = json.loads(done.stdout.splitlines()[-1])
    assert (library, version) == (str(PACKAGE / "lib" / "nsa_metadata.so"), "unknown")
    assert adapter in ("in-graph", "eager")
