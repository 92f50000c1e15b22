"""``sglang-nsa-plugin ab``: planted gains are found, faults end in words, nothing stays switched."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
from email.message import Message
from pathlib import Path
from unittest import mock

import pytest
from ab_stand_in import SharedClock, StandIn, WallClock
from commands import command, program

from sglang_nsa_plugin.cli import main
from sglang_nsa_plugin.cli.ab import compare, load, run, server

LENGTHS = ("--input-len", "8", "--output-len", "128")


@pytest.fixture
def stand_in(monkeypatch):
    clock = SharedClock()
    monkeypatch.setattr(load, "perf_counter", clock)
    monkeypatch.setattr(server, "PAUSES_S", (0.01, 0.01))
    with StandIn(clock) as each:
        yield each


@pytest.fixture
def ab(stand_in, tmp_path):
    """Runs the command in this process; gives the cells of its result file, if it wrote one."""

    def run(*options, requests="1", code=0):
        path = tmp_path / "ab.json"
        arguments = ["ab", stand_in.url, "--requests", requests, *LENGTHS, "--json", str(path), *options]
        assert main.main(arguments) == code
        return json.loads(path.read_text())["cells"] if path.exists() else None

    return run


# What is measured


def test_a_planted_gain_of_5_percent_is_found(stand_in, ab, capsys):
    stand_in.step_ms = {"on": 9.5, "off": 10.0}
    stand_in.noise = 0.01
    for cell in ab(requests="1,6"):
        assert cell["step_on_over_off"]["median"] == pytest.approx(0.95, abs=0.01)
        assert cell["step_off_over_off"]["median"] == pytest.approx(1, abs=0.01)
        assert cell["step_ms"]["off"] == pytest.approx(10, rel=0.01)
        assert cell["tokens_per_step"]["off"] == pytest.approx(2.5, abs=0.2)
        n = int(cell["load"])
        assert cell["tokens_per_s"]["off"] == pytest.approx(n * 250, rel=0.08)
        assert "% faster (" in cell["verdict"]
    assert "6 at once: with the plugin a step is" in capsys.readouterr().out


def test_a_planted_loss_is_found(stand_in, ab):
    stand_in.step_ms = {"on": 10.3, "off": 10.0}
    (cell,) = ab()
    assert cell["verdict"] == "with the plugin a step is 3.0% slower (3.0% to 3.0%)"


def test_no_gain_is_found_where_none_is_planted(stand_in, ab):
    stand_in.noise = 0.01
    for cell in ab(requests="1,6"):
        assert cell["verdict"].startswith("no difference beyond noise: on ÷ off ")
        assert cell["resolved"]


def test_prefill_is_not_counted(stand_in, ab):
    stand_in.prefill_ms = {"on": 500.0, "off": 5.0}
    for cell in ab(requests="1,6"):
        assert cell["step_ms"]["on"] == pytest.approx(10)
        assert cell["step_on_over_off"]["median"] == pytest.approx(1)


def test_steps_after_the_first_request_has_ended_are_not_counted(stand_in, ab):
    stand_in.share_of_fewer = 0.5
    (cell,) = ab("--rounds", "6", requests="6")
    assert cell["step_ms"]["on"] == pytest.approx(10)


def test_events_of_several_steps_are_counted_by_their_tokens(stand_in, ab):
    stand_in.step_ms = {"on": 8.0, "off": 10.0}
    stand_in.steps_per_event = dict.fromkeys(("on", "off"), 4)
    single, several = ab("--output-len", "512", requests="1,6")
    assert single["step_ms"]["off"] == pytest.approx(10)
    assert several["step_ms"]["off"] == pytest.approx(10, rel=0.02)
    assert several["step_on_over_off"]["median"] == pytest.approx(0.8, rel=0.02)
    assert several["step_is"] == "mean"


def test_a_gain_is_found_among_long_steps(stand_in, ab):
    """Every fifth step is long, for a reason that has nothing to do with the plugin."""
    stand_in.step_ms = {"on": 9.5, "off": 10.0}
    stand_in.long_steps = {"on": 10.0 / 9.5 * 6, "off": 6.0}
    for cell in ab("--rounds", "6", "--output-len", "512", requests="1,6"):
        assert cell["step_is"] == "median"
        assert cell["step_ms"]["off"] == pytest.approx(10)
        assert cell["step_on_over_off"]["median"] == pytest.approx(0.95)
        assert cell["verdict"].startswith("with the plugin a step is 5.0% faster")
        n = int(cell["load"])
        assert cell["tokens_per_s"]["off"] == pytest.approx(n * 125, rel=0.1)  # a step takes 20 ms
        on, off = (turn["step_ms"] for turn in map(cell["every_round"][0].get, ("on", "off")))
        assert (on, off) == (pytest.approx(19.6, rel=0.03), pytest.approx(20, rel=0.03))


def test_a_median_step_is_not_compared_with_a_mean(stand_in, ab):
    """Where SGLang sends fewer events than steps in one arm, all arms are compared by their means."""
    stand_in.long_steps = {"on": 6.0, "off": 6.0}
    stand_in.steps_per_event = {"on": 4, "off": 1}
    (cell,) = ab("--rounds", "6", "--output-len", "1024")
    assert cell["step_is"] == "mean"
    assert cell["step_on_over_off"]["median"] == pytest.approx(1, abs=0.03)
    assert cell["step_ms"]["off"] == pytest.approx(20, rel=0.02)


def test_a_shaky_control_resolves_nothing(stand_in, ab):
    """Somebody else's work makes every second of the two off arms slower."""
    steps = iter([10.0] * 2 + [10.0, 10.0, 11.0, 10.0, 11.0, 10.0, 11.0, 10.0, 10.0] * 2)
    batch = stand_in.batch

    def slower(body):
        stand_in.step_ms = dict.fromkeys(("on", "off"), next(steps))
        return batch(body)

    stand_in.batch = slower
    (cell,) = ab("--rounds", "6", code=1)
    assert cell["verdict"].startswith("not resolved: off ÷ off is 1.100, more than 2% from 1. ")


def test_prompts_are_new_each_time(stand_in, ab):
    ab("--rounds", "6", requests="1,3")
    assert len(stand_in.prompts) == (1 + 3) * (2 + 6 * 3)
    assert len(set(map(tuple, stand_in.prompts))) == len(stand_in.prompts)
    assert {len(prompt) for prompt in stand_in.prompts} == {8}


def test_arms_are_switched_in_rotated_order(stand_in, ab):
    ab("--rounds", "6")
    assert stand_in.switched == [0, 1, *([1, 0, 0, 0, 0, 1, 0, 1, 0] * 2), 1]


def test_fewer_rounds_than_can_tell_are_refused():
    done = command("ab", "localhost:1", "--rounds", "5")
    assert done.returncode == 2
    assert "must be 6 or more, got 5: fewer rounds cannot tell a gain from noise" in done.stderr


@pytest.mark.parametrize(("count", "left_out"), [(6, 0), (8, 0), (9, 1), (12, 2), (15, 3)])
def test_the_range_of_a_median(count, left_out):
    """Bounds from tables of the sign test at 5 %, two-sided."""
    values = random.Random(0).sample(range(100), count)
    found = compare.ratio([float(value) for value in values])
    assert (found.low, found.high) == (sorted(values)[left_out], sorted(values)[-1 - left_out])


@pytest.mark.parametrize(
    ("step", "control", "verdict"),
    [
        ((0.95, 0.94, 0.96), (1.0, 0.96, 1.01), "with the plugin a step is 5.0% faster (4.0% to 6.0%)"),
        ((0.95, 0.94, 0.96), (1.0, 0.94, 1.01), "no difference beyond noise"),
        ((0.95, 0.94, 0.96), (1.0, 0.99, 1.06), "no difference beyond noise"),
        ((0.98, 0.94, 1.01), (1.0, 0.99, 1.01), "no difference beyond noise"),
        ((0.95, 0.94, 0.96), (0.979, 0.97, 0.99), "not resolved: off ÷ off is 0.979, more than 2%"),
    ],
)
def test_the_verdict(step, control, verdict):
    _, said = compare.verdict_of(compare.Ratio(*step), compare.Ratio(*control))
    assert said.startswith(verdict)


def test_the_load_of_others_is_watched(stand_in, ab, monkeypatch):
    def pass_time(seconds):
        arm = "on" if stand_in.is_on else "off"
        for _ in range(round(seconds * 1e3 / stand_in.step_ms[arm])):
            stand_in.count_step()
            stand_in.clock.now += stand_in.step_ms[arm] / 1e3
            generated["tokens"] += 25
        stand_in.metrics = f'sglang:generation_tokens_total{{model_name="m"}} {generated["tokens"]}.0\n'

    generated = {"tokens": 0}
    monkeypatch.setattr(load, "sleep", pass_time)
    stand_in.step_ms = {"on": 9.5, "off": 10.0}
    stand_in.metrics = 'sglang:generation_tokens_total{model_name="m"} 0.0\n'
    (cell,) = ab("--load", "external")
    assert cell["verdict"].startswith("with the plugin a step is 5.0% faster")
    assert cell["tokens_per_s"]["off"] == pytest.approx(2500)
    assert stand_in.calls["batches"] == 0


def test_an_idle_server_under_external_load_resolves_nothing(stand_in, ab, monkeypatch):
    monkeypatch.setattr(load, "sleep", lambda _: None)
    (cell,) = ab("--load", "external", code=1)
    assert cell["verdict"] == (
        "not resolved: the server took 0 steps in 5 s, fewer than 8: keep it busy all the while"
    )


# Keys


def test_keys_reach_the_server(stand_in, ab):
    stand_in.api_key, stand_in.admin_api_key = "user", "admin"
    assert ab("--rounds", "6", "--api-key", "user", "--admin-api-key", "admin")[0]["resolved"]


@pytest.mark.parametrize("keys", [(), ("--api-key", "user")])
def test_a_key_that_is_missing(stand_in, ab, capsys, keys):
    """Nothing is sent."""
    stand_in.api_key, stand_in.admin_api_key = "user", "admin"
    assert ab(*keys, code=1) is None
    assert (
        "answered HTTP 401: it wants a key. Pass --api-key, and --admin-api-key"
        in capsys.readouterr().err
    )
    assert stand_in.calls["batches"] == 0


def test_a_redirect_takes_no_key_elsewhere(stand_in, ab, capsys):
    with StandIn(WallClock()) as other:
        stand_in.redirect = f"{other.url}/server_info"
        assert ab("--api-key", "secret", code=1) is None
        moved = f"/server_info answered HTTP 307: it moved. Give its new address, {other.url}"
        assert moved in " ".join(capsys.readouterr().err.split())


# Servers with nothing to compare: exit code 2, nothing sent, nothing switched


def no_plugin(stand_in):
    stand_in.records = [None]


def idle(stand_in):
    stand_in.records[0] |= {"adapter": None, "reason": "HIP is not supported"}


def only_verify(stand_in):
    """The switch would show in verify's record, and what ab reads is draft-extend's."""
    stand_in.verify = {**stand_in.records[0], "in_place": True}
    stand_in.records[0] |= {"adapter": None, "reason": "--nsa-metadata-roles leaves it out"}


def one_rank_idle(stand_in):
    stand_in.records.append({**stand_in.records[0], "adapter": None, "reason": "no draft model"})


def difference_found(stand_in):
    stand_in.records[0] |= {"in_place": False, "first_mismatch": "real_page_table[3] is 1"}


def no_speculation(stand_in):
    stand_in.info["speculative_algorithm"] = None


def old_plugin(stand_in):
    del stand_in.records[0]["switched_on"]


def roles_torn(stand_in):
    stand_in.verify = {**stand_in.records[0], "in_place": True, "switched_on": False}


def torn(stand_in):
    stand_in.records.append({**stand_in.records[0], "switched_on": False})


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (no_plugin, "does not load the plugin: /server_info has no nsa_metadata. Install"),
        (idle, "does not fill draft-extend on all ranks of the server at {url}: HIP is not supported"),
        (only_verify, "on all ranks of the server at {url}: --nsa-metadata-roles leaves it out"),
        (one_rank_idle, "on all ranks of the server at {url}: no draft model"),
        (difference_found, "on all ranks of the server at {url}: real_page_table[3] is 1"),
        (no_speculation, "runs without speculative decoding, and ab compares speculative steps"),
        (old_plugin, "the plugin 0.1.0 of the server at {url} cannot be switched in service: upgrade"),
        (torn, "are switched differently ([true, false]). Switch all of them first: curl {url}/set_"),
        (roles_torn, '({{"draft-extend": true, "verify": false}}), and ab switches all of them.'),
    ],
)
def test_a_server_with_nothing_to_compare(stand_in, ab, capsys, plant, words):
    plant(stand_in)
    assert ab(code=2) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert words.format(url=stand_in.url) in printed
    assert stand_in.calls["batches"] == 0
    assert stand_in.switched == []


# Faults


def test_a_switch_that_is_refused(stand_in, ab, capsys):
    stand_in.refuses = True
    assert ab(code=1) is None
    told = capsys.readouterr().err
    assert "answered [false] to nsa_metadata = 0 instead of true" in told
    assert "could not switch" not in told  # it never was switched
    assert stand_in.calls["batches"] == 0


def test_a_rank_that_does_not_switch(stand_in, ab, capsys):
    stand_in.records.append({**stand_in.records[0], "fallbacks": {}})
    stand_in.stuck_ranks = (1,)
    assert ab(code=1) is None
    assert "/server_info shows switched_on = [false, true]" in capsys.readouterr().err
    assert stand_in.is_on
    assert stand_in.calls["batches"] == 0


def test_an_arm_that_was_not_what_its_name_says(stand_in, ab):
    stand_in.ignores_switch = True
    (cell,) = ab(code=1)
    assert cell["verdict"].startswith("not resolved: the plugin filled ")
    assert "steps while it was off" in cell["verdict"]


def test_a_plugin_that_falls_back_while_it_is_on(stand_in, ab):
    """As where a batch is larger than the captured graphs: only its last steps have one."""

    def count_step():
        (record,) = stand_in.records
        by_plugin = stand_in.is_on and record["fallbacks"].get("any", 0) % 10 == 9
        record["replays"] += by_plugin
        record["fallbacks"]["any"] = record["fallbacks"].get("any", 0) + 1

    stand_in.count_step = count_step
    (cell,) = ab(code=1)
    assert re.match(
        "not resolved: the plugin filled draft-extend in \\d of \\d\\d steps while", cell["verdict"]
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_a_role_that_sglang_fills_while_the_plugin_is_on(stand_in, ab, in_place, capsys):
    """A role that the plugin does not fill at all is no part of the comparison."""
    stand_in.verify = {"replays": 0, "launches": 0, "fallbacks": {}, "falls_back": True}
    stand_in.verify["in_place"] = in_place
    (cell,) = ab("--rounds", "6", code=int(in_place))
    verdict = "not resolved: the plugin filled verify in 0 of" if in_place else "no difference"
    assert cell["verdict"].startswith(verdict)
    shown = " ".join(capsys.readouterr().out.split())
    assert ("roles draft-extend, verify" in shown) == in_place


def test_every_role_is_switched(stand_in, ab):
    stand_in.verify = {"replays": 0, "launches": 0, "fallbacks": {}, "falls_back": False}
    assert ab("--rounds", "6")[0]["resolved"]
    assert stand_in.verify["replays"] == stand_in.records[0]["replays"] > 0


def test_a_role_counts_where_every_rank_fills_it():
    both, one = {"roles": {"draft-extend": {}, "verify": {}}}, {"roles": {"draft-extend": {}}}
    assert run.filled_roles([both, both]) == ["draft-extend", "verify"]
    assert run.filled_roles([both, one]) == ["draft-extend"]


def test_more_requests_than_the_server_runs_at_once(stand_in, ab):
    """That cell is given up after its first batch; the others are measured."""
    stand_in.at_once = 2
    few, many = ab("--rounds", "6", requests="2,6")
    assert few["resolved"]
    assert not many["resolved"]
    assert "lower --requests to what the server runs at once" in many["verdict"]
    assert stand_in.calls["batches"] == 2 + 6 * 3 + 1


def test_requests_that_the_server_aborts(stand_in, ab, capsys):
    stand_in.aborts = True
    assert ab(code=1) is None
    assert (
        'ended a request early: {"type": "abort", "message": "out of memory"}' in capsys.readouterr().err
    )
    assert stand_in.is_on


def test_a_server_that_dies_midway(stand_in, ab, capsys):
    stand_in.dies_in_batch = 4
    assert ab(code=1) is None
    told = capsys.readouterr().err
    assert "the answer of /generate broke off: did the server die?" in told
    assert "could not switch the plugin on again, as it was found" in told
    body = '{"server_args": {"nsa_metadata": 1}}'
    header = "-H 'Content-Type: application/json'"
    assert f"curl {stand_in.url}/set_internal_state {header} -d '{body}'" in told


def test_a_server_that_does_not_answer(stand_in, ab, capsys, monkeypatch):
    monkeypatch.setattr(server, "ANSWER_S", 0.1)
    stand_in.hangs = True
    assert ab(code=1) is None
    assert f"no answer from {stand_in.url}/server_info: timed out" in capsys.readouterr().err


def test_no_server(ab, stand_in, capsys):
    stand_in.server.server_close()
    assert main.main(["ab", stand_in.url]) == 1
    assert f"no answer from {stand_in.url}/server_info: [Errno 1" in capsys.readouterr().err


def test_a_second_signal_does_not_cut_the_way_back_short():
    """As a wrapper or `timeout` sends it, while the server takes its time to answer."""
    with StandIn(WallClock()) as stand_in, interrupted(stand_in) as process:
        with mock.patch.object(stand_in, "server_info", slowly(stand_in.server_info)):
            for _ in range(3):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors == "sglang-nsa-plugin ab: switching the plugin on, as it was found\n"
        assert stand_in.is_on


def slowly(answer):
    def answered():
        time.sleep(0.5)
        return answer()

    return answered


@contextlib.contextmanager
def interrupted(stand_in):
    """The command in a process of its own, which waits for its first answer, switched off."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_nsa_plugin", "ab", stand_in.url, "--requests", "1"],
        env={**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert stand_in.generating.wait(30)
    assert not stand_in.is_on
    yield process


def test_a_server_that_was_found_off_is_left_off_and_that_is_said(stand_in, ab, capsys):
    stand_in.records[0]["switched_on"] = False
    ab("--rounds", "6")
    assert not stand_in.is_on
    told = capsys.readouterr().out
    assert told.startswith("The plugin is switched off on this server, and stays so in the end.")
    assert f"\ncurl {stand_in.url}/set_internal_state -H" in told


@pytest.mark.parametrize("at_batch", [None, 3])
def test_other_processes_that_answer_are_told(stand_in, ab, capsys, at_batch):
    """Several replicas behind one address, in turn; or a server that was started again meanwhile."""
    pids = itertools.cycle([7, 8])

    def with_pid(record):
        moved = stand_in.calls["batches"] >= at_batch if at_batch is not None else next(pids) == 8
        return {**record, "pid": 8 if moved else 7}

    with mock.patch.object(stand_in, "_with_roles", with_pid):
        assert ab(code=1) is None
    told = capsys.readouterr().err
    assert "other processes answer at" in told
    assert "give the address of one" in told
    assert (stand_in.switched == []) is (at_batch is None)
    assert ("do it by hand:\n    curl" in told) is (at_batch is not None)
    another_switched = (
        "another replica may have been switched. Check that nsa_metadata.switched_on is true"
    )
    assert (another_switched in told) is (at_batch is not None)


@pytest.mark.parametrize("seed", [15, 16, 28])  # the other one answers after four looks
def test_replicas_that_answer_by_chance_are_told_before_one_is_switched(stand_in, ab, capsys, seed):
    """As behind a service of Kubernetes: each connection goes to one of them."""
    chance = random.Random(seed)
    with mock.patch.object(stand_in, "_with_roles", lambda each: {**each, "pid": chance.choice([7, 8])}):
        assert ab(code=1) is None
    assert "other processes answer at" in capsys.readouterr().err
    assert stand_in.switched == []


def test_other_roles_are_switched_back_though_draft_extend_failed_meanwhile(stand_in, ab, capsys):
    """A role that has failed keeps its switch, so what is shown of it says nothing of the others."""
    asked, switch = [], stand_in.switch
    stand_in.verify = {**stand_in.records[0], "in_place": True, "fallbacks": {}, "falls_back": False}

    def with_a_failure(body):
        asked.append(body["server_args"]["nsa_metadata"])
        stand_in.verify["switched_on"] = bool(asked[-1])
        return [True] if stand_in.calls["batches"] > 2 and stand_in.is_on else switch(body)

    with mock.patch.object(stand_in, "switch", with_a_failure):
        assert ab(code=1) is None
    assert asked[-2:] == [0, 1]
    assert "not every rank of" in capsys.readouterr().err


def test_an_error_answer_that_breaks_off_is_still_an_answer():
    """Else nobody would try again to leave the server as it was found."""
    body = mock.Mock(read=mock.Mock(side_effect=http.client.IncompleteRead(b"")), fp=None)
    error = urllib.error.HTTPError("http://host", 502, "Bad Gateway", Message(), body)
    assert server._refusal(error) == "HTTP 502: Bad Gateway"


def test_a_signal_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server._signals_as_exit(signal.SIGTERM, signal.SIGHUP), server._held_back(signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--json", "{folder}/no/ab.json"),
            "--json {folder}/no/ab.json: there is no folder {folder}/no;",
        ),
        (("--json", "{folder}"), "--json must name a file, got '{folder}'"),
        (("--plot", "{folder}/ab.xyz"), "--plot must end in .png or .svg, got '{folder}/ab.xyz'"),
        (("--api-key", "user\r"), "--api-key must be printable ASCII characters, and has others"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_sent(stand_in, tmp_path, capsys, options, words):
    given = [each.format(folder=tmp_path) for each in options]
    assert main.main(["ab", stand_in.url, *given]) == 1
    told = capsys.readouterr().err
    assert words.format(folder=tmp_path) in told
    assert "user" not in told
    assert (stand_in.switched, stand_in.calls["batches"]) == ([], 0)


def test_a_file_that_cannot_be_written_costs_no_result(stand_in, capsys):
    assert main.main(["ab", stand_in.url, "--requests", "1", *LENGTHS, "--json", "/dev/full"]) == 1
    told = capsys.readouterr()
    assert "--json /dev/full: could not be written: No space left on device" in told.err
    assert "1 at once: no difference beyond noise" in told.out


def test_output_that_nobody_reads_costs_no_file(tmp_path):
    path = tmp_path / "ab.json"
    with StandIn(WallClock()) as stand_in, open("/dev/full", "w") as full:
        few = ["--requests", "1", "--rounds", "6", "--input-len", "8", "--output-len", "64"]
        arguments = ["-m", "sglang_nsa_plugin", "ab", stand_in.url, *few, "--json", str(path)]
        done = subprocess.run([sys.executable, *arguments], stdout=full, check=False)
    assert done.returncode != 0
    assert len(json.loads(path.read_text())["cells"]) == 1


def test_ranks_that_answer_in_another_order_are_the_same(stand_in, ab):
    """SGLang lists data-parallel ranks in the order in which they answer."""
    stand_in.records = [{**stand_in.records[0], "pid": pid, "fallbacks": {}} for pid in (8, 9)]
    info = stand_in.server_info

    def shuffled():
        found = info()
        stand_in.random.shuffle(found["internal_states"])
        return found

    with mock.patch.object(stand_in, "server_info", shuffled):
        (cell,) = ab()
    assert cell["resolved"]


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host", "http://[::1", "http://", "localhost:30000?x=1", "localhost:99999"),
        *("http://a..b:3", f"http://{'a' * 64}:3", "localhost:1/ü", "localhost:１２"),
    ],
)
def test_an_address_that_is_none(url, capsys):
    assert main.main(["ab", url]) == 1
    assert "URL must be an address like localhost:30000 or https://host:443" in capsys.readouterr().err


def test_a_narrow_terminal_cuts_no_number_off(stand_in, ab, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    (cell,) = ab()
    shown = [
        line for line in capsys.readouterr().out.splitlines() if " / " in line and "medians" not in line
    ]
    assert len(shown) == 1
    assert f"{cell['step_on_over_off']['median']:.3f}" in shown[0]


def test_a_range_of_very_many_rounds():
    """More than a float can hold: 2**1100."""
    found = compare.ratio([1 + each / 1100 for each in range(1100)])
    assert found.low < found.median < found.high < 1.6


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_the_server_as_it_was_found(sent, code):
    with StandIn(WallClock()) as stand_in, interrupted(stand_in) as process:
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert errors == "sglang-nsa-plugin ab: switching the plugin on, as it was found\n"
        assert stand_in.aborted.wait(10)
        assert stand_in.is_on


def test_no_torch_and_no_sglang_is_needed(stand_in):
    """The command runs on any machine that reaches the server."""
    stand_in.records = [None]
    text = "import sys; sys.modules['torch'] = sys.modules['sglang'] = sys.modules['tvm_ffi'] = None"
    done = program(text, "ab", stand_in.url)
    assert done.returncode == 2, done.stderr


def test_the_plot_shows_each_cell(stand_in, ab, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ab.svg"
    ab("--rounds", "6", "--plot", str(path), requests="1,2")
    assert path.read_text().startswith("<?xml")
