"""Draft-decode and verify of 0.5.13 and 0.5.14: recorded in their graphs, beside an eager draft-extend.

Their values are compared in test_draft_decode_role.py, test_verify_role.py and test_roles.py, which run
with these releases, too. Here is what differs from later ones.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cpu_pair import CPU, make_pair, on_the_cpu, random_batch, step_and_expect_equal
from stand_in_server import MAKE_BACKEND, start

from sglang_nsa_plugin.adapters import eager, in_graph, install, mqa_schedule, taken_over, wide_tables
from sglang_nsa_plugin.adapters.eager_names import DSA, names_of_generation
from sglang_nsa_plugin.options import ROLES_VARIABLE
from sglang_nsa_plugin.state import ROLES, STATES, record

pytestmark = on_the_cpu

IN_GRAPHS = ("draft-decode", "verify")
only_before = pytest.mark.skipif(
    in_graph.is_generation() or names_of_generation() is not DSA,
    reason="this SGLang is not 0.5.13 or 0.5.14",
)


def schedule_of(lengths, block, processors):
    return torch.stack([lengths[:, 0] * block, torch.full_like(lengths[:, 0], processors)], dim=1)


def test_the_schedule_is_deepgemms_where_sglang_has_no_method_for_it(monkeypatch):
    """What SGLang calls inline there: once for a schedule that is not there yet, then into it."""
    deep_gemm = SimpleNamespace(get_paged_mqa_logits_metadata=schedule_of, get_num_sms=lambda: 132)
    monkeypatch.setitem(sys.modules, DSA.module, SimpleNamespace(deep_gemm=deep_gemm))
    backend, metadata = SimpleNamespace(), SimpleNamespace(paged_mqa_schedule_metadata=None)
    mqa_schedule.refresh(backend, metadata, torch.tensor([[3]]))
    first = metadata.paged_mqa_schedule_metadata
    assert first.tolist() == [[192, 132]]
    mqa_schedule.refresh(backend, metadata, torch.tensor([[5]]))
    assert metadata.paged_mqa_schedule_metadata is first
    assert first.tolist() == [[320, 132]]


def test_its_method_is_called_where_there_is_one():
    seen = []
    backend = SimpleNamespace(_refresh_paged_mqa_schedule_metadata=lambda **named: seen.append(named))
    mqa_schedule.refresh(backend, "metadata", "lengths")
    assert seen == [{"metadata": "metadata", "seqlens_32_2d": "lengths"}]


@only_before
def test_the_roles_have_their_own_adapter_and_no_wide_table_is_dropped(state):
    """SGLang's allocation there makes the table narrower without speculation, and the graphs read it."""
    assert install.adapter_for_installed().name == "eager"
    assert not wide_tables.can_be_dropped()
    for role in IN_GRAPHS:
        pair = make_pair(role=role)
        assert not pair.fills().drops_wide_tables
        width = pair.metadata(1).page_table_1.shape[1]
        assert width == pair.theirs.metadata(1)[0].page_table_1.shape[1] == 512 + 4
        step_and_expect_equal(pair, random_batch(pair, torch.Generator().manual_seed(1)))
        found = record()["roles"][role]
        assert (found["adapter"], found["replays"]) == ("in-graph", 1)
        # Draft steps share one table, of which SGLang has one for each.
        assert bool(found["bytes_saved"]) == (role == "draft-decode")


@only_before
def test_the_three_roles_serve_beside_one_another(state):
    """Draft-extend by its own launches, the others in their graphs, on backends of three objects."""
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.eager_pair import EagerPair

    pairs = [make_pair(role=role) for role in IN_GRAPHS]
    assert taken_over.TAKEOVERS["verify"].request is not None
    extend = EagerPair(CPU, (1, 2), draft_tokens=4, context_len=512, pool_size=12)
    assert taken_over.TAKEOVERS["verify"].request is None  # not asked for by the last pair
    generator, diff = torch.Generator().manual_seed(2), Diff()
    for pair in pairs:
        step_and_expect_equal(pair, random_batch(pair, generator))
    random_batch(pairs[0], generator, raw_bs=2)
    extend.inputs.seq_lens.fill_(9)
    extend.step(2, diff)
    assert diff.first is None, diff.first
    assert [STATES[role].replays for role in IN_GRAPHS] == [1, 1]
    assert (state.launches, state.replays) == (1, 0)
    adapter = install.adapter_for_installed()
    for role, pair in zip(IN_GRAPHS, pairs, strict=True):
        assert adapter.why_unfilled(pair.ours.backend) is None
        assert adapter.why_not_in_place(role) is None
        pair.fills().forget()
        assert adapter.why_unfilled(pair.ours.backend).startswith(
            f"SGLang captured no CUDA graph of {role}"
        )
    assert eager._why_unfilled(extend.ours.backend) is None


@only_before
def test_only_draft_extend_is_filled_by_default(tmp_path):
    """Only servers of 0.5.14 have been tried with the other two."""
    started = start(tmp_path, change=MAKE_BACKEND, **{ROLES_VARIABLE: ""})
    assert started.record["in_place"] == {"draft-extend": True, "draft-decode": False, "verify": False}
    lines = started.lines("not used: before SGLang 0.5.15, only servers of 0.5.14 have filled ")
    assert [role for role, line in zip(ROLES[1:], lines, strict=True) if role in line] == [*ROLES[1:]]
    named = start(tmp_path, change=MAKE_BACKEND, **{ROLES_VARIABLE: "draft-extend,verify"})
    assert named.lines("not used: SGLang made no NSA/DSA attention backend for verify")
