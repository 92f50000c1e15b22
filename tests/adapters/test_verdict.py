"""The verdict once a scheduler is made: is the fill in place, and what happens where it is not."""

from __future__ import annotations

import pytest
from cpu_pair import skip_unless_captured
from stand_in_server import DSA, MAKE_BACKEND, start

from sglang_nsa_plugin.options import ROLES_VARIABLE
from sglang_nsa_plugin.state import ROLES

BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
REPLACE_IN_GRAPH = """
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend as Backend
hooked = Backend.init_forward_metadata_in_graph
Backend.init_forward_metadata_in_graph = {}
"""
FORGET = """
from sglang_nsa_plugin.adapters import taken_over
taken_over.TAKEOVERS["draft-extend"].backends[0]._nsa_fills.forget()
"""
WITHOUT_SPECULATION = {"speculative_algorithm": None, "attention_backend": "dsa"}
NO_DRAFT_MODEL = "self.draft_worker = None\n"
NO_BACKEND = "SGLang made no NSA/DSA attention backend for draft-extend"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**DSA, "speculative_algorithm": "NGRAM"}, f"{NO_BACKEND}, as EAGLE and MTP have one"),
        ({**DSA, "speculative_algorithm": "NGRAM"}, "speculative algorithm NGRAM"),
        (
            {
                "speculative_algorithm": "DFLASH",
                "attention_backend": "dsa",
                "speculative_draft_attention_backend": "fa3",
            },
            "draft-extend runs on --speculative-draft-attention-backend fa3",
        ),
        (
            {**DSA, "speculative_draft_attention_backend": "triton"},
            "draft-extend runs on --speculative-draft-attention-backend triton",
        ),
        (DSA, NO_BACKEND),
    ],
)
def test_a_server_without_a_backend_to_fill(tmp_path, settings, said):
    started = start(tmp_path, settings=settings)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": False}
    assert said in started.record["reason"]
    (line,) = started.lines("not used: ")
    assert said in line

    by_name = start(tmp_path, "--nsa-metadata-backend", "torch", settings=settings)
    assert by_name.returncode != 0
    assert not by_name.is_ready
    (line,) = by_name.lines("torch was asked for by name and cannot be used: ")
    assert said in line


@pytest.mark.parametrize("worker", ["None", "SimpleNamespace(_hosts_draft=False)"])
def test_a_pipeline_stage_without_the_draft_model_serves_whatever_was_asked_for(tmp_path, worker):
    skip_unless_captured()
    flags = ("--nsa-metadata-backend", "torch", "--nsa-metadata-roles", "draft-extend,draft-decode")
    started = start(tmp_path, *flags, change=f"self.draft_worker = {worker}")
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": False, "draft-decode": False}
    lines = started.lines("not used: the draft model runs on the last pipeline stage")
    assert [role in line for role, line in zip(("draft-extend", "draft-decode"), lines, strict=True)]
    with_draft = f"self.draft_worker = {worker.replace('False', 'True').replace('None', 'object()')}"
    assert start(tmp_path, *flags, change=with_draft).returncode != 0


def test_one_speculative_step_has_no_draft_decode(tmp_path):
    skip_unless_captured()
    flags = ("--nsa-metadata-backend", "torch", "--nsa-metadata-roles", "draft-extend,draft-decode")
    settings = {**DSA, "speculative_num_steps": 1}
    started = start(tmp_path, *flags, settings=settings, change=MAKE_BACKEND)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": True, "draft-decode": False}
    assert started.lines("not used: with one speculative step SGLang has no draft-decode graph")
    settings["speculative_num_steps"] = 2
    assert start(tmp_path, *flags, settings=settings, change=MAKE_BACKEND).returncode != 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (WITHOUT_SPECULATION, "no speculative decoding"),
        ({"speculative_algorithm": "EAGLE", "attention_backend": "fa3"}, "attention backend fa3 is not"),
        ({**DSA, "disaggregation_mode": "prefill"}, "a prefill server "),
        (
            {**DSA, "disaggregation_mode": "prefill", "enable_pd_role_switch": True},
            "a prefill server ",
        ),
    ],
)
def test_a_server_without_anything_to_fill_serves_whatever_was_asked_for(tmp_path, settings, reason):
    by_default = {ROLES_VARIABLE: ""}
    started = start(tmp_path, "--nsa-metadata-backend", "torch", settings=settings, **by_default)
    assert started.returncode == 0, started.log
    assert started.record["reason"].startswith(reason)
    assert started.record["in_place"] == dict.fromkeys(ROLES, False)
    (line,) = started.lines("not used: ")
    assert line.endswith("SGLang fills draft-extend, draft-decode, verify metadata itself")


def test_a_server_without_speculation_has_a_verdict_on_decode_where_it_is_named(tmp_path):
    skip_unless_captured("decode")
    flags = ("--nsa-metadata-roles", "decode")
    make = NO_DRAFT_MODEL + MAKE_BACKEND.replace('"torch",', '"torch", role="decode",')
    started = start(tmp_path, *flags, settings=WITHOUT_SPECULATION, change=make)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": False, "decode": True}
    assert started.lines("decode is in place: adapter in-graph, implementation torch, ")
    assert started.lines("asked for by name: on a GPU, only SGLang 0.5.23 has served")

    started = start(tmp_path, *flags, settings=WITHOUT_SPECULATION, change=NO_DRAFT_MODEL)
    assert started.record["in_place"] == {"draft-extend": False, "decode": False}
    reason = started.record["roles"]["decode"]["reason"]
    assert reason == "SGLang made no NSA/DSA attention backend for decode (attention backend dsa)"
    by_name = (*flags, "--nsa-metadata-backend", "torch")
    ended = start(tmp_path, *by_name, settings=WITHOUT_SPECULATION, change=NO_DRAFT_MODEL)
    assert ended.returncode != 0


def test_a_server_with_speculation_serves_though_decode_was_named(tmp_path):
    skip_unless_captured()
    flags = ("--nsa-metadata-backend", "torch", "--nsa-metadata-roles", "draft-extend,decode")
    started = start(tmp_path, *flags, change=MAKE_BACKEND)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": True, "decode": False}
    assert started.lines("not used: with speculative decoding the target model has verify in its graphs")


def test_by_default_each_role_has_its_own_verdict(tmp_path):
    skip_unless_captured()
    started = start(tmp_path, change=MAKE_BACKEND, **{ROLES_VARIABLE: ""})
    assert started.record["in_place"] == {"draft-extend": True, "draft-decode": False, "verify": False}
    lines = started.lines("not used: SGLang made no NSA/DSA attention backend for ")
    assert [role in line for role, line in zip(ROLES[1:], lines, strict=True)]


def test_graphs_that_were_never_captured(tmp_path):
    skip_unless_captured()
    flags = ("--disable-cuda-graph",)
    started = start(tmp_path, *flags, change=MAKE_BACKEND + FORGET)
    assert started.returncode == 0, started.log
    assert started.record["adapter"] is None
    assert started.record["in_place"] == {"draft-extend": False}
    reason = started.record["reason"]
    assert reason.startswith("SGLang captured no CUDA graph of draft-extend")
    assert reason.endswith("CUDA graphs disabled)")
    assert started.lines(f"not used: {reason}")
    flags += ("--nsa-metadata-backend", "torch")
    assert start(tmp_path, *flags, change=MAKE_BACKEND + FORGET).returncode != 0


def test_a_plugin_that_replaced_the_constructor_later(tmp_path):
    replace = "module.Scheduler.__init__ = lambda self, *a, **k: make(self, *a, **k)"
    started = start(tmp_path, after_loading=replace)
    assert started.returncode == 0, started.log
    assert "Scheduler.__init__ did not run" in started.record["reason"]
    by_name = start(tmp_path, "--nsa-metadata-backend", "torch", after_loading=replace)
    assert by_name.returncode != 0
    assert not by_name.is_ready


def test_a_plugin_that_replaced_a_hooked_method_of_the_backend_later(tmp_path):
    skip_unless_captured()
    change = MAKE_BACKEND + REPLACE_IN_GRAPH.format("lambda self, forward_batch: None")
    started = start(tmp_path, change=change)
    assert started.returncode == 0, started.log
    target = f"{BACKEND}.init_forward_metadata_in_graph"
    assert started.record["reason"].startswith(f"another plugin replaced {target} after this one")
    assert started.record["in_place"] == {"draft-extend": False}
    assert start(tmp_path, "--nsa-metadata-backend", "torch", change=change).returncode != 0


def test_a_wrapper_around_a_hooked_method_keeps_the_fill_in_place(tmp_path):
    skip_unless_captured()
    wrapper = "__import__('functools').wraps(hooked)(lambda *a, **k: hooked(*a, **k))"
    change = MAKE_BACKEND + REPLACE_IN_GRAPH.format(wrapper)
    started = start(tmp_path, change=change)
    assert started.record["in_place"] == {"draft-extend": True}


NGRAM = ("--speculative-algorithm", "NGRAM", "--attention-backend")
RAY = "with --use-ray schedulers run in Ray actors, where SGLang loads no plugins"


@pytest.fixture(scope="module")
def sparse() -> str:
    from sglang_nsa_plugin.adapters import eager_names

    return eager_names.names_of_generation().prefix


def test_the_launcher_says_that_ray_actors_load_no_plugins(tmp_path, sparse):
    started = start(tmp_path, *NGRAM, sparse, "--use-ray")
    (line,) = started.lines(RAY)
    assert "not used: " in line
    assert started.lines("set up in each scheduler process") == []


def test_a_backend_by_name_ends_a_launcher_with_ray(tmp_path, sparse):
    named = ("--use-ray", "--nsa-metadata-backend", "torch")
    ended = start(tmp_path, *NGRAM, sparse, *named)
    assert ended.returncode != 0
    assert ended.lines(f"--nsa-metadata-backend torch cannot run: {RAY}")
    # nothing to fill
    assert start(tmp_path, *named, settings={}).returncode == 0


def test_the_shadow_check_ends_what_was_in_place(state):
    from test_outcome import Difference

    from sglang_nsa_plugin.adapters.outcome import Outcome

    outcome = Outcome()
    state.in_place = True
    outcome.fail(Difference())
    assert state.in_place is False
    assert state.reason.startswith("the shadow check found a difference: ")
