"""Verify's tree mask, through SGLang's own function and its own Triton kernels, interpreted.

The compiled kernels that SGLang takes on an NVIDIA GPU: gpu/test_gpu_tree_mask.py.
"""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
import tree_mask_calls
from cpu_pair import BATCH_SIZES, DRAFT_TOKENS, make_pair, on_the_cpu, random_batch
from failing_calls import errors_of, every_call, failing_call, fresh, sglangs
from isolated import run
from test_switch import ask
from tree_mask_calls import (
    arguments,
    build,
    draw,
    expect_blocks_of_the_full_mask,
    expect_same_but_for_the_mask,
    expect_slots_of_the_drafts,
    skip_without_the_function,
)

from sglang_nsa_plugin.adapters import tree_mask
from sglang_nsa_plugin.adapters.outcome import OUTCOMES
from sglang_nsa_plugin.state import VERIFY_STATE, record

pytestmark = on_the_cpu

CONTEXT = 512
SAVED = BATCH_SIZES[-1] * DRAFT_TOKENS * CONTEXT
SHORT = (
    f"short while the plugin fills verify: up to {SAVED:,} bytes less to write and hold in a step of "
    f"{BATCH_SIZES[-1]} requests, none of which NSA/DSA attention reads"
)
PREFIX = "tree mask of verify: "


@pytest.fixture
def pair(state, monkeypatch):
    return make(monkeypatch)


def make(monkeypatch, role="verify", **harness):
    skip_without_the_function()
    on_sglangs_triton_kernels(monkeypatch)
    pair = make_pair(role=role, **harness)
    runner = pair.ours.model_runner
    runner.attn_backend = pair.ours.backend
    runner.model_config.model_is_mrope = False
    return pair


def on_sglangs_triton_kernels(monkeypatch):
    """SGLang builds trees with Triton on XPU alone; a chain, from 0.5.22 on, wherever there is CUDA."""
    from sglang.srt.speculative import eagle_utils

    module = eagle_utils
    if not hasattr(eagle_utils, "sgl_build_tree_kernel_triton"):  # since 0.5.23
        from sglang.kernels.ops.speculative import spec_tree as module
    monkeypatch.setattr(module, "_is_xpu", True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))


def lines(caplog):
    messages = [record_.getMessage() for record_ in caplog.records]
    return [text.partition(PREFIX)[2] for text in messages if PREFIX in text]


def full(bs):
    return bs * DRAFT_TOKENS * (CONTEXT + DRAFT_TOKENS)


def short(bs):
    return bs * DRAFT_TOKENS * DRAFT_TOKENS


def test_only_the_mask_is_another_one(pair):
    generator = torch.Generator().manual_seed(1)
    for bs in (1, 2, 3, 5, 8):
        draw(pair, generator, bs)
        ours = build(pair, bs)
        assert ask(nsa_metadata_verify=0)
        sglangs = build(pair, bs)
        assert ask(nsa_metadata_verify=1)
        assert (ours.custom_mask.numel(), sglangs.custom_mask.numel()) == (short(bs), full(bs))
        assert ours.custom_mask.dtype == sglangs.custom_mask.dtype == torch.bool
        expect_same_but_for_the_mask(ours, sglangs)
        expect_blocks_of_the_full_mask(pair, bs, ours.custom_mask, sglangs.custom_mask)


def test_the_chain_that_newer_releases_build_in_one_launch_has_the_drafts_slots(pair):
    bs = 5
    draw(pair, torch.Generator().manual_seed(2), bs)
    verify_input = build(pair, bs)
    if not hasattr(verify_input, "prepared_out_cache_loc"):
        pytest.skip("this SGLang builds a chain as it builds a tree")
    expect_slots_of_the_drafts(pair, bs, verify_input.prepared_out_cache_loc)
    ask(nsa_metadata_verify=0)
    assert build(pair, bs).prepared_out_cache_loc is None


@pytest.mark.parametrize("draft_tokens", [2, 6])
def test_other_numbers_of_draft_tokens(state, monkeypatch, draft_tokens):
    pair = make(monkeypatch, draft_tokens=draft_tokens)
    ours = build(pair, 2)
    ask(nsa_metadata_verify=0)
    sglangs = build(pair, 2)
    assert ours.custom_mask.numel() == 2 * draft_tokens**2
    expect_same_but_for_the_mask(ours, sglangs)


def test_one_line_and_the_record_say_what_it_saves(pair, caplog):
    caplog.set_level(logging.INFO)
    assert record()["tree_mask"] is None
    VERIFY_STATE.captures.update(BATCH_SIZES)  # as after real captures
    for bs in BATCH_SIZES:
        build(pair, bs)
    assert lines(caplog) == [SHORT]
    assert record()["tree_mask"] == SHORT


def test_each_backend_is_asked_once_and_two_that_agree_give_one_line(pair, monkeypatch, caplog):
    """Adaptive speculation has several."""
    caplog.set_level(logging.INFO)
    asked, runner = [], pair.ours.model_runner
    why_read = tree_mask.why_read
    monkeypatch.setattr(tree_mask, "why_read", lambda *args: asked.append(args) or why_read(*args))
    with pair.stub_process():
        second = type(pair.ours.backend)(runner)
    for backend in (pair.ours.backend, second) * 2:
        runner.attn_backend = backend
        assert build(pair, 2).custom_mask.numel() == short(2)
    assert len(asked) == 2
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("key", ["nsa_metadata", "nsa_metadata_verify"])
def test_the_switch_gives_sglang_its_mask_back(pair, key):
    for _ in range(2):
        assert build(pair, 2).custom_mask.numel() == short(2)
        assert ask(**{key: 0})
        assert build(pair, 2).custom_mask.numel() == full(2)
        assert ask(**{key: 1})


@pytest.mark.parametrize("ended", ["a difference", "an error in service", "start-up found no fill"])
def test_where_sglang_fills_verify_the_mask_is_sglangs(pair, ended):
    assert build(pair, 2).custom_mask.numel() == short(2)
    outcome = OUTCOMES["verify"]
    if ended == "a difference":
        outcome.fail(SimpleNamespace(count=1))
    elif ended == "an error in service":
        outcome.fail_in_service(RuntimeError("planted"))
    else:
        outcome.step_aside("auto", "planted")
    assert build(pair, 2).custom_mask.numel() == full(2)


def test_without_the_role_the_mask_is_sglangs(state, monkeypatch):
    pair = make(monkeypatch, role="draft-extend")
    assert build(pair, 2).custom_mask.numel() == full(2)
    assert record()["tree_mask"] is None


# --- what reads the mask ---


@pytest.mark.parametrize(
    ("server_args", "said"),
    [
        ({"enable_two_batch_overlap": True}, "two-batch overlap (enable_two_batch_overlap) cuts it"),
        ({"pp_size": 2}, "pipeline parallelism (pp_size 2) is not supported"),
    ],
)
def test_settings_with_which_the_mask_stays_sglangs(pair, server_args, said, caplog):
    from sglang_nsa_plugin.harness import process_stubs

    caplog.set_level(logging.INFO)
    server_args = process_stubs.publish_server_args(speculative_algorithm="EAGLE", **server_args)
    pair.ours.model_runner.server_args = server_args
    expect_sglangs(pair, said, caplog)


def test_watermarking_keeps_the_mask(pair, caplog):
    caplog.set_level(logging.INFO)
    pair.ours.model_runner.watermark_state = object()
    expect_sglangs(pair, "watermarking reads it", caplog)


def test_a_backend_with_a_mask_of_its_own_keeps_it(pair, caplog):
    caplog.set_level(logging.INFO)
    backend = pair.ours.backend
    own = torch.zeros(full(2), dtype=torch.bool)

    class Masked(type(backend)):
        if hasattr(backend, "verify_mask"):
            verify_mask = SimpleNamespace(
                mode=full_mask(), is_read=True, buffer=own, fits=lambda bs: True
            )
        else:  # 0.5.16

            def get_verify_buffers_to_fill_after_draft(self):
                return [own, None]

    backend.__class__ = Masked
    assert build(pair, 2).custom_mask is own
    assert lines(caplog) == ["SGLang's: Masked has a mask of its own"]


def full_mask():
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    return TreeMaskMode.FULL_MASK


def test_a_backend_that_the_plugin_does_not_fill_keeps_its_mask(pair, caplog):
    caplog.set_level(logging.INFO)
    pair.ours.model_runner.attn_backend = pair.theirs.backend
    name = type(pair.theirs.backend).__name__
    expect_sglangs(pair, f"the plugin does not fill the target's {name}", caplog)


def test_trees_keep_their_mask(pair):
    backend, runner = pair.ours.backend, pair.ours.model_runner
    assert tree_mask.why_read(backend, runner, 1, full_mask()) is None
    said = tree_mask.why_read(backend, runner, 4, full_mask())
    assert said == "drafts are trees, not chains (topk 4)"


def test_a_mask_that_is_short_already_is_left_alone(pair, caplog):
    caplog.set_level(logging.INFO)
    build(pair, 2, tree_mask_mode=type(full_mask()).QLEN_ONLY)
    assert lines(caplog) == ["SGLang's: it is QLEN_ONLY"]


def expect_sglangs(pair, said, caplog):
    for _ in range(2):
        assert build(pair, 2).custom_mask.numel() == full(2)
    (line,) = lines(caplog)
    assert line.startswith(f"SGLang's: {said}")
    assert record()["tree_mask"] == line


# --- what goes wrong ---


@pytest.mark.parametrize("where", ["the decision", "SGLang's function with a short mask"])
def test_an_error_leaves_the_mask_to_sglang(pair, where, monkeypatch, caplog):
    asked = []

    def fail(*_):
        asked.append(where)
        raise RuntimeError("planted")

    if where == "the decision":
        monkeypatch.setattr(tree_mask, "why_read", fail)
    else:
        fail_with_short_masks(monkeypatch, fail)
    for _ in range(3):
        assert build(pair, 2).custom_mask.numel() == full(2)
    assert asked == [where]
    (line,) = [text for text in caplog.messages if "RuntimeError: planted" in text and "lost" in text]
    assert "verify's short tree mask is lost" in line
    assert record()["tree_mask"].startswith("SGLang's: RuntimeError: planted")
    assert OUTCOMES["verify"].phase.value == "active"
    assert not VERIFY_STATE.fallbacks


def test_whichever_call_of_ours_fails_sglangs_function_answers(state, monkeypatch, caplog):
    def run_with(number):
        caplog.clear()
        fresh()
        pair = make(monkeypatch)
        args, kwargs = arguments(pair, 2)
        original = sglangs(eagle_worker_common().build_eagle_verify_input)
        with failing_call(number) as failed:
            built = tree_mask.TREE_MASK.build(original, *args, **kwargs)
        assert original.calls == 1, failed
        size = built.custom_mask.numel()
        if size == short(2):  # at most a line of the log was lost
            assert not errors_of(caplog), failed
        else:
            assert size == full(2), failed
            assert len(errors_of(caplog)) == 1, failed
            assert build(pair, 2).custom_mask.numel() == full(2), failed
        return failed

    assert {"TreeMask._decide", "why_read", "resolved", "setattr"} <= set(every_call(run_with))


def eagle_worker_common():
    from sglang.srt.speculative import eagle_worker_common as module

    return module


def fail_with_short_masks(monkeypatch, fail):
    module = eagle_worker_common()
    build_tree = module.build_tree_kernel_efficient

    def build_tree_unless_short(*args, **kwargs):
        return fail() if args[9].name == "QLEN_ONLY" else build_tree(*args, **kwargs)

    monkeypatch.setattr(module, "build_tree_kernel_efficient", build_tree_unless_short)
    if hasattr(module, "build_chain_tree"):
        monkeypatch.setattr(module, "build_chain_tree", lambda *args, **kwargs: fail())


def test_an_error_of_sglangs_own_stays_sglangs(pair, monkeypatch):
    monkeypatch.setattr(tree_mask_calls, "batch", lambda *_: SimpleNamespace(forward_mode=None))
    with pytest.raises(AttributeError, match="is_idle"):
        build(pair, 2)


@pytest.mark.parametrize("changed", ["parameters", "name"])
def test_a_function_that_does_not_fit_leaves_verify_to_the_plugin(state, monkeypatch, caplog, changed):
    caplog.set_level(logging.INFO)
    hook = tree_mask.HOOK
    other = {"parameters": ("batch",)} if changed == "parameters" else {"target": f"{hook.target}_gone"}
    monkeypatch.setattr(tree_mask, "HOOK", dataclasses.replace(hook, **other))
    pair = make_pair(role="verify")
    (line,) = lines(caplog)
    assert line.startswith(f"SGLang's: this SGLang does not fit: {tree_mask.HOOK.target} ")
    pair.replay(random_batch(pair, torch.Generator().manual_seed(3)))
    assert VERIFY_STATE.replays == 1


BESIDE_ANOTHER_PLUGIN = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType
from sglang_nsa_plugin.adapters.in_graph import ADAPTER
from sglang_nsa_plugin.adapters.tree_mask import HOOK, TREE_MASK
from sglang_nsa_plugin.state import record

HookRegistry.register(HOOK.target, print, HookType.BEFORE, source=HookSource("other", "other"))
HookRegistry.apply_hooks()
TREE_MASK.install(ADAPTER.takeovers["verify"])
print(record()["tree_mask"])
"""


def test_another_plugin_on_the_same_function_is_named():
    skip_without_the_function()
    said = run(BESIDE_ANOTHER_PLUGIN).stdout.splitlines()[-1]
    assert said == f"SGLang's: another plugin (other) patched {tree_mask.HOOK.target} before"
