"""The shadow check around SGLang's real backend object, on CPU tensors.

In real CUDA graphs it is checked by integration/test_shadow_serving.py and integration/soak.py.
"""

from __future__ import annotations

import logging

import pytest
import torch
from graph_twin import make_twin, on_the_cpu, random_batch

pytestmark = on_the_cpu

FIELDS = (
    "cache_seqlens_int32",
    "cu_seqlens_k",
    "dsa_seqlens_expanded",
    "dsa_cache_seqlens_int32",
    "dsa_cu_seqlens_k",
    "page_table_1",
    "real_page_table",
)


@pytest.mark.parametrize("rig", [{}, {"page_size": 1}, {"draft_tokens": 2}], ids=str)
def test_every_replay_is_checked_and_equal(rig, state):
    from sglang_nsa_plugin.cli.replay import Comparison
    from sglang_nsa_plugin.shadow import Field

    twin = make_twin(check_every=1, **rig)
    generator = torch.Generator().manual_seed(1)
    result = Comparison()
    for _ in range(20):
        twin.step(random_batch(twin, generator), result)
    assert result.first is None, result.first
    assert state.checks == 20
    assert state.mismatches == 0
    assert not state.fallbacks
    assert state.values_checked > 19 * 100  # the last check's are not told yet
    check = twin._taken_over().checked.check
    assert not check.failed()
    assert state.values_checked == check.report.on_device[Field.VALUES]


@pytest.mark.parametrize(("every", "checks"), [(0, 0), (3, 4), (13, 0)])
def test_every_nth_replay_is_checked(every, checks, state):
    twin = make_twin(check_every=every)
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        twin.replay(random_batch(twin, generator))
    assert state.replays == 12
    assert state.checks == checks


@pytest.mark.parametrize("field", FIELDS)
def test_a_planted_error_is_found_and_sglang_takes_over(field, state, monkeypatch, caplog):
    """A wrong number behind the fill, as a graph would hold it: found, said, and never served again."""
    from sglang_nsa_plugin.adapters.captured import DraftExtendFill
    from sglang_nsa_plugin.adapters.checked import DIFFERENT
    from sglang_nsa_plugin.cli.replay import Comparison, compare

    refresh_derived = DraftExtendFill.refresh_derived

    def wrong(fill, metadata):
        tensor = getattr(metadata, field)
        (tensor[:, 0] if tensor.dim() == 2 else tensor).add_(fill.enabled)
        refresh_derived(fill, metadata)

    monkeypatch.setattr(DraftExtendFill, "refresh_derived", wrong)
    twin = make_twin(check_every=1)
    generator = torch.Generator().manual_seed(3)
    bs = random_batch(twin, generator)
    with caplog.at_level(logging.ERROR):
        twin.replay(bs)
        twin.replay(bs)
    assert state.checks == 1
    assert state.mismatches > 0
    assert state.first_mismatch is not None
    assert state.first_mismatch.startswith(f"{field}[")
    (line,) = [r.getMessage() for r in caplog.records if "shadow check found" in r.getMessage()]
    assert state.first_mismatch in line
    assert "serves through SGLang's own fill" in line

    # from now on every value is SGLang's
    for _ in range(5):
        bs = random_batch(twin, generator)
        twin.replay(bs)
        twin.theirs.sglang_fill(bs)
        result = Comparison()
        ours, theirs = (one.backend.decode_cuda_graph_metadata[bs] for one in (twin.ours, twin.theirs))
        compare(ours, theirs, result)
        assert result.first is None, result.first
    assert state.fallbacks == {DIFFERENT: 6}
    assert state.replays == 1
    assert state.checks == 1


def test_a_difference_ends_our_fill_of_every_backend(state):
    """A process can have several draft-extend backends, each with a check of its own."""
    from sglang_nsa_plugin.adapters.checked import DIFFERENT

    twin = make_twin(check_every=1)
    state.first_mismatch = "another backend's"
    twin.replay(random_batch(twin, torch.Generator().manual_seed(6)))
    assert (state.replays, state.fallbacks) == (0, {DIFFERENT: 1})


def test_the_check_leaves_the_metadata_alone(state):
    """SGLang fills the copy: what the model reads keeps its tensors and its values."""
    twin = make_twin(check_every=1)
    backend = twin.ours.backend
    generator = torch.Generator().manual_seed(4)
    bs = random_batch(twin, generator)
    metadata = backend.decode_cuda_graph_metadata[bs]
    addresses = {k: v.data_ptr() for k, v in vars(metadata).items() if isinstance(v, torch.Tensor)}
    twin.replay(bs)
    assert backend.forward_metadata is metadata
    assert backend.decode_cuda_graph_metadata[bs] is metadata
    assert {k: getattr(metadata, k).data_ptr() for k in addresses} == addresses
    copy, _ = twin._taken_over().checked._copies[bs]
    shared = {k for k, address in addresses.items() if getattr(copy, k).data_ptr() == address}
    assert shared == set()


def test_new_graph_tensors_get_new_copies(state):
    """Recapture: SGLang allocates its tensors anew, and the check follows."""
    from sglang_nsa_plugin.cli.replay import Comparison

    twin = make_twin(check_every=1)
    generator = torch.Generator().manual_seed(5)
    twin.replay(random_batch(twin, generator))
    for one in (twin.ours, twin.theirs):
        one.init_state()
    for bs in twin.batch_sizes:
        twin.ours.capture_setup(bs)
        twin.theirs.capture_setup(bs)
        twin._replays[bs] = twin._capture(bs)
    result = Comparison()
    for _ in range(5):
        twin.step(random_batch(twin, generator), result)
    twin.replay(random_batch(twin, generator))
    assert result.first is None, result.first
    assert state.checks == 7
    assert state.mismatches == 0
