"""What the tests of the in-graph adapter share: two of SGLang's backends, one of them taken over."""

from __future__ import annotations

import logging
import operator
import sys

import pytest
import torch

from sglang_nsa_plugin.adapters.outcome import OUTCOMES

CPU = torch.device("cpu")
BATCH_SIZES = (1, 2, 4, 8)
DRAFT_TOKENS = 4

on_the_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, tests/gpu/test_gpu_in_graph.py covers the adapter"
)


def make_pair(backend: str = "auto", **harness: object):
    skip_unless_captured(harness.get("role", "draft-extend"))
    from sglang_nsa_plugin.harness.graph_pair import GraphPair

    settings = {"draft_tokens": DRAFT_TOKENS, "context_len": 512, "pool_size": 12, **harness}
    return GraphPair(CPU, BATCH_SIZES, backend, **settings)


def skip_unless_captured(role: str = "draft-extend") -> None:
    from sglang_nsa_plugin.adapters import in_graph, install, supported

    if role == "decode" and supported.why_no_decode_fence() is not None:
        pytest.skip("this SGLang frees req_to_token before a decode graph is replayed, or has none")
    if not (in_graph.is_generation() or role in install.adapter_for_installed().parts):
        pytest.skip(f"this SGLang does not capture DSA's {role} in graphs that the plugin fills")


def random_batch(pair, generator, raw_bs=None):
    from sglang_nsa_plugin.harness.inputs import random_step

    raw_bs = raw_bs or int(torch.randint(1, BATCH_SIZES[-1] + 1, (), generator=generator))
    bs = pair.bucket(raw_bs)
    random_step(pair.inputs, generator, raw_bs, bs, pair.ours.draft_tokens, longest(pair))
    return bs


def longest(pair):
    """With a pooled index SGLang looks up in the table where the last draft token's key goes."""
    ours = pair.ours
    reads_drafts = ours.index_kpool > 1 and ours.role == "verify"
    return ours.longest - (ours.draft_tokens if reads_drafts else 0)


def expect_equal(pair, bs):
    """Both backends' metadata of this batch size hold the same live values now."""
    from sglang_nsa_plugin.harness.diff import Diff

    diff = Diff()
    pair.compare(bs, diff)
    assert diff.first is None, diff.first


def expect_equal_after_sglang_fill(pair, bs):
    pair.theirs.sglang_fill(bs)
    expect_equal(pair, bs)


def replay_and_expect_equal(pair, bs):
    """Without poison, which would be compared: the last replay's tensors stay until the next one."""
    pair.replay(bs)
    expect_equal_after_sglang_fill(pair, bs)


def expect_every_replay_to_be_checked(pair, least_values):
    """Before the next one; also without a hook of the plugin's behind a replay."""
    outcome = OUTCOMES[pair.fills().role.name]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    assert (outcome.state.checks, outcome.state.mismatches) == (19, 0)
    assert outcome.state.values_checked > least_values
    assert not outcome.has_failed


def expect_the_error_to_be_found(pair, field, caplog):
    """The one that was planted; SGLang fills this role from then on, and no other."""
    state = pair.fills().role.state
    generator = torch.Generator().manual_seed(3)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            pair.replay(random_batch(pair, generator))
    assert state.first_mismatch.startswith(f"{field}[")
    (line,) = [r.getMessage() for r in caplog.records if "shadow check found" in r.getMessage()]
    assert f"serves {state.role} through SGLang's own fill" in line
    for _ in range(4):
        replay_and_expect_equal(pair, random_batch(pair, generator))
    assert [role for role, outcome in OUTCOMES.items() if outcome.has_failed] == [state.role]


def step_and_expect_equal(pair, bs):
    """Our lengths are poisoned before."""
    from sglang_nsa_plugin.harness.diff import Diff

    result = Diff()
    pair.step(bs, result)
    assert result.first is None, result.first
    return result


def plan_and_expect_nothing_written(pair, bs):
    """SGLang plans; then the graph runs over other inputs, which a fill that is on would read."""
    with pair.stub_process():
        pair.ours.backend.init_forward_metadata_out_graph(pair.ours.replay_view(bs))
    pair.theirs.sglang_fill(bs)
    kept = pair.inputs.seq_lens.clone()
    pair.inputs.seq_lens.fill_(1)
    pair.replay_graph(bs)
    pair.inputs.seq_lens.copy_(kept)
    expect_equal(pair, bs)


def expect_sglang_to_take(pair, change, other_mode):
    """A batch size on the fast path is SGLang's in a call that is another one, in this respect."""
    from sglang_nsa_plugin.adapters import in_graph, taken_over

    bs = random_batch(pair, torch.Generator().manual_seed(13), raw_bs=2)
    step_and_expect_equal(pair, bs)
    backend, view, seen = pair.ours.backend, pair.ours.replay_view(bs), []
    assert getattr(backend, taken_over.FAST_PATH)[bs]
    if change == "another mode":
        view.forward_mode = other_mode
    elif change == "req_to_token":
        backend.req_to_token = backend.req_to_token.clone()
    elif change != "in capture":
        setattr(view, change, getattr(view, change).clone())
    original = lambda backend, batch, **kwargs: seen.append(batch)  # noqa: E731
    in_graph._out_graph(original, backend, view, in_capture=change == "in capture")
    assert seen == [view]


def expect_prefills_impl_as_sglang_leaves_it(pair):
    bs = random_batch(pair, torch.Generator().manual_seed(14), raw_bs=2)
    for _ in range(2):
        pair.ours.backend.use_mha = pair.theirs.backend.use_mha = True
        step_and_expect_equal(pair, bs)
        assert pair.ours.backend.use_mha is pair.theirs.backend.use_mha is False


def functions_of_a_known_replay(pair):
    """Which functions of the plugin a replay enters whose inputs were validated before."""
    bs = random_batch(pair, torch.Generator().manual_seed(10))
    step_and_expect_equal(pair, bs)
    view, entered = pair.ours.replay_view(bs), []

    def profile(frame, event, _):
        if event == "call" and frame.f_globals["__name__"].startswith("sglang_nsa_plugin."):
            entered.append(frame.f_code.co_name)

    with pair.stub_process():
        sys.setprofile(profile)
        pair.ours.backend.init_forward_metadata_out_graph(view)
        sys.setprofile(None)
    return entered


def plant_error(field, monkeypatch):
    """From now on graphs hold a wrong number after the fill, where the fill is on."""
    from sglang_nsa_plugin.adapters.captured_fill import BackendFills

    refresh_derived = BackendFills.refresh_derived

    def wrong(fill, metadata):
        tensor = operator.attrgetter(field)(metadata)
        (tensor[:, 0] if tensor.dim() == 2 else tensor).add_(fill.enabled)
        refresh_derived(fill, metadata)

    monkeypatch.setattr(BackendFills, "refresh_derived", wrong)


def draft_tokens_as_sglang_decides(pair):
    """What SGLang sees of speculation each time that it decides about the wide table."""
    seen = []

    class Watched(type(pair.ours.steps()[0])):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "dsa_drop_wide_page_table":
                seen.append(self.speculative_num_draft_tokens)
            super().__setattr__(name, value)

    for step in pair.ours.steps():
        step.__class__ = Watched
    pair.ours.init_state()
    assert {step.speculative_num_draft_tokens for step in pair.ours.steps()} == {pair.ours.draft_tokens}
    return seen
