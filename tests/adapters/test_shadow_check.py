"""The shadow check around SGLang's real backend object, on CPU tensors.

In real CUDA graphs: integration/serving/test_shadow_serving.py and integration/gpu/soak.py.
"""

from __future__ import annotations

import logging

import pytest
import torch
from cpu_pair import make_pair, on_the_cpu, plant_error, random_batch

from sglang_nsa_plugin.shadow import Difference

pytestmark = on_the_cpu

A_DIFFERENCE = Difference(
    count=1, tensor="cu_seqlens_k", row=0, column=1, ours=3, theirs=4, batch_size=2, length=None
)
FIELDS = (
    "cache_seqlens_int32",
    "cu_seqlens_k",
    "dsa_seqlens_expanded",
    "dsa_cache_seqlens_int32",
    "dsa_cu_seqlens_k",
    "page_table_1",
    "real_page_table",
)


@pytest.mark.parametrize("harness", [{}, {"page_size": 1}, {"draft_tokens": 2}], ids=str)
def test_every_replay_is_checked_and_equal(harness, state):
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.shadow import Field

    pair = make_pair(check_every=1, **harness)
    generator = torch.Generator().manual_seed(1)
    result = Diff()
    for _ in range(20):
        pair.step(random_batch(pair, generator), result)
    assert result.first is None, result.first
    assert state.checks == 20
    assert state.mismatches == 0
    assert not state.fallbacks
    assert state.values_checked > 19 * 100  # the last check's are not told yet
    check = pair.fills().shadowed.check
    assert not check.failed()
    assert state.values_checked == check.report.on_device[Field.VALUES]


@pytest.mark.parametrize(("every", "checks"), [(0, 0), (3, 4), (13, 0)])
def test_every_nth_replay_is_checked(every, checks, state):
    pair = make_pair(check_every=every)
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        pair.replay(random_batch(pair, generator))
    assert state.replays == 12
    assert state.checks == checks


@pytest.mark.parametrize("field", FIELDS)
def test_a_planted_error_is_found_and_sglang_takes_over(field, state, monkeypatch, caplog):
    """A wrong number behind the fill, as a graph would hold it: found, said, and never served again."""
    from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
    from sglang_nsa_plugin.harness.diff import Diff, compare_captured

    plant_error(field, monkeypatch)
    pair = make_pair(check_every=1)
    generator = torch.Generator().manual_seed(3)
    bs = random_batch(pair, generator)
    with caplog.at_level(logging.ERROR):
        pair.replay(bs)
        pair.replay(bs)
    assert state.checks == 1
    assert state.mismatches > 0
    assert state.first_mismatch is not None
    assert state.first_mismatch.startswith(f"{field}[")
    (line,) = [r.getMessage() for r in caplog.records if "shadow check found" in r.getMessage()]
    assert state.first_mismatch in line
    assert "serves draft-extend through SGLang's own fill" in line

    # from now on every value is SGLang's
    for _ in range(5):
        bs = random_batch(pair, generator)
        pair.replay(bs)
        pair.theirs.sglang_fill(bs)
        result = Diff()
        ours, theirs = (one.backend.decode_cuda_graph_metadata[bs] for one in (pair.ours, pair.theirs))
        compare_captured(ours, theirs, result)
        assert result.first is None, result.first
    assert state.fallbacks == {FallbackReason.DIFFERENCE_FOUND.value: 6}
    assert state.replays == 1
    assert state.checks == 1


def test_a_difference_ends_our_fill_of_every_backend(state):
    """A process can have several draft-extend backends, each with a check of its own."""
    from sglang_nsa_plugin.adapters.fallbacks import FallbackReason
    from sglang_nsa_plugin.adapters.outcome import OUTCOME

    pair = make_pair(check_every=1)
    OUTCOME.fail(A_DIFFERENCE)
    pair.replay(random_batch(pair, torch.Generator().manual_seed(6)))
    assert (state.replays, state.fallbacks) == (0, {FallbackReason.DIFFERENCE_FOUND.value: 1})


def test_what_is_reported_decides_nothing(state):
    """Whatever is written into the state, the outcome says who fills."""
    pair = make_pair(check_every=1)
    state.first_mismatch, state.adapter, state.backend = "a difference", None, None
    pair.replay(random_batch(pair, torch.Generator().manual_seed(7)))
    assert (state.replays, state.checks, dict(state.fallbacks)) == (1, 1, {})


def test_a_difference_is_final(state):
    """Neither another backend nor another request brings the plugin's fill back."""
    from sglang_nsa_plugin.adapters.outcome import OUTCOME, Phase

    make_pair(check_every=1)
    assert OUTCOME.phase is Phase.ACTIVE
    OUTCOME.fail(A_DIFFERENCE)
    pair = make_pair(check_every=1)
    pair.replay(random_batch(pair, torch.Generator().manual_seed(8)))
    OUTCOME.report_idle("another reason")
    assert OUTCOME.phase is Phase.FAILED
    assert (state.adapter, state.replays) == ("in-graph", 0)


def test_the_check_leaves_the_metadata_alone(state):
    """SGLang fills the copy: what the model reads keeps its tensors and its values."""
    pair = make_pair(check_every=1)
    backend = pair.ours.backend
    generator = torch.Generator().manual_seed(4)
    bs = random_batch(pair, generator)
    metadata = backend.decode_cuda_graph_metadata[bs]
    addresses = {k: v.data_ptr() for k, v in vars(metadata).items() if isinstance(v, torch.Tensor)}
    pair.replay(bs)
    assert backend.forward_metadata is metadata
    assert backend.decode_cuda_graph_metadata[bs] is metadata
    assert {k: getattr(metadata, k).data_ptr() for k in addresses} == addresses
    copy, _ = pair.fills().shadowed._copies[bs]
    shared = {k for k, address in addresses.items() if getattr(copy, k).data_ptr() == address}
    assert shared == set()


def test_new_graph_tensors_get_new_copies(state):
    """Recapture: SGLang allocates its tensors anew, and the check follows."""
    from sglang_nsa_plugin.harness.diff import Diff

    pair = make_pair(check_every=1)
    generator = torch.Generator().manual_seed(5)
    pair.replay(random_batch(pair, generator))
    for one in (pair.ours, pair.theirs):
        one.init_state()
    for bs in pair.batch_sizes:
        pair.ours.capture_setup(bs)
        pair.theirs.capture_setup(bs)
        pair._replays[bs] = pair._capture(bs)
    result = Diff()
    for _ in range(5):
        pair.step(random_batch(pair, generator), result)
    pair.replay(random_batch(pair, generator))
    assert result.first is None, result.first
    assert state.checks == 7
    assert state.mismatches == 0
