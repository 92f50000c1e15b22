"""What the probe of ``programmatic_noop`` is asked and answers; what it launches needs a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("triton.language.extra.cuda", reason="needs Triton's CUDA extras")

from integration.serving import programmatic_noop
from integration.serving.programmatic_noop import SETTINGS, Switched

PROBE = Path(programmatic_noop.__file__).parent / "noop_probe" / "noop_probe.py"


@pytest.fixture
def probe(monkeypatch):
    """The probe's module, which a thread of each test serves as one of a scheduler does."""
    spec = importlib.util.spec_from_file_location("noop_probe", PROBE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv(module.COARSE_FENCE, "0")
    return module


@pytest.fixture
def ask(probe, tmp_path):
    """Asks as the script does, and gives what the probe answers."""
    switched = Switched(None, tmp_path)

    def answered(setting):
        threading.Timer(0.05, probe.take, (tmp_path, None)).start()
        return switched.ask(setting)

    return answered


def test_the_coarse_fence_is_sglangs_own_variable_while_it_is_asked_for(probe, ask):
    from sglang.srt.environ import envs

    forced = envs.SGLANG_FORCE_COARSE_WAR_BARRIER
    assert forced.name == probe.COARSE_FENCE
    for name, is_coarse in (("off", False), ("coarse fence", True), ("off again", False)):
        ask(SETTINGS[name])
        assert forced.get() is is_coarse
        assert probe.before == "nothing"


def test_a_prelude_is_asked_for_and_the_steps_since_are_answered(probe, ask):
    """Of the graph that was replayed most often."""
    probe.replays.update({1: [0, 5_000], 2: [0, 2_000, 5_000]})
    assert ask(SETTINGS["8 no-ops"]) == [2.0, 3.0]
    assert probe.before == "8 no-ops"
    assert probe.replays == {}
    assert os.environ[probe.COARSE_FENCE] == "0"


def test_the_deepest_graph_is_the_one_that_takes_longest_to_launch(probe, ask):
    probe.launch_ns.update({1: 9_000, 2: 400_000, 3: 7_000})
    assert [probe.is_shallow(graph) for graph in (1, 2, 3, 4)] == [True, False, True, True]
    ask(SETTINGS["no-op before verify"])
    assert (probe.before, probe.only_deepest) == ("no-op", True)
    assert probe.launch_ns == {}  # of other batch sizes
    assert not probe.is_shallow(1)  # the first to be launched, while nothing is known
    ask(SETTINGS["no-op"])
    assert (probe.before, probe.only_deepest) == ("no-op", False)


def test_the_same_request_is_answered_once(probe, tmp_path):
    asked = {"id": 3, **SETTINGS["no-op"]._asdict()}
    (tmp_path / "ask").write_text(json.dumps(asked))
    assert probe.take(tmp_path, None) == 3
    (tmp_path / "done").unlink()
    assert probe.take(tmp_path, 3) == 3
    assert not (tmp_path / "done").exists()


def test_the_command_measures_the_same_again(monkeypatch):
    options = argparse.Namespace(
        layers=2, rounds=5, requests=[1, 16], servers=["plugin"], settings=["off", "coarse fence"],
        alone=True,
    )  # fmt: skip
    assert programmatic_noop.command_of(options) == (
        "python -m integration.serving.programmatic_noop --alone --layers 2 --rounds 5 "
        "--requests 1 16 --servers plugin --settings off 'coarse fence'"
    )
