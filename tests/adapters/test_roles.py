"""The plans of target-verify and draft-decode: one fill writes what SGLang's own backends write.

SGLang's code makes the metadata of both plans twice over the same inputs, on CPU tensors, and fills one
of them. The plugin's kernel fills the other one, with the numbers of the role.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cpu_pair import CPU, DRAFT_TOKENS, on_the_cpu, skip_unless_captured

from sglang_nsa_plugin import FillArgs, fill
from sglang_nsa_plugin.adapters import fields
from sglang_nsa_plugin.harness.diff import Diff, compare_captured
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.harness.inputs import random_step
from sglang_nsa_plugin.self_test import POISON

pytestmark = on_the_cpu

BATCH_SIZES = (1, 3, 8)
SHAPES = [
    {},
    {"page_size": 1},
    {"draft_tokens": 2},
    {"draft_tokens": 6, "index_topk": 100},
    {"page_size": 16, "context_len": 1_001},
]


class Role(NamedTuple):
    """A plan of SGLang's step: its name, and its numbers for so many draft tokens."""

    name: str
    rows_per_request: int
    length_offset: int


def verify(draft_tokens: int = DRAFT_TOKENS) -> Role:
    return Role("verify", draft_tokens, draft_tokens)


def draft_decode(draft_tokens: int = DRAFT_TOKENS) -> Role:
    return Role("draft-decode", 1, 0)


def make(role, inputs=None, **shape):
    skip_unless_captured(role.name)
    settings = {"draft_tokens": DRAFT_TOKENS, "context_len": 512, "pool_size": 12, **shape}
    made = GraphBackend(CPU, role=role.name, inputs=inputs, **settings)
    made.init_state()
    for bs in BATCH_SIZES:
        made.capture_setup(bs)
    return made


def fill_args(role, harness, metadata, bs):
    """The arguments of the fill that writes this metadata of SGLang's."""
    outputs = fields.read(metadata, fields.DSA, fields.DSA)
    if metadata.dsa_seqlens_expanded is metadata.cache_seqlens_int32:
        outputs["seqlens_expanded"] = None
    if metadata.page_size == 1:
        outputs["real_page_table"] = None
    return FillArgs(
        seq_lens=harness.inputs.seq_lens[:bs],
        req_pool_indices=harness.inputs.req_pool_indices[:bs],
        req_to_token=harness.inputs.req_to_token,
        extend_lens=role.rows_per_request,
        length_offset=role.length_offset,
        index_topk=harness.index_topk,
        page_size=metadata.page_size,
        **outputs,
    )


def steps(role, **shape):
    """Random steps, of which each gives our metadata, filled by the plugin's kernel, and SGLang's."""
    ours = make(role, **shape)
    theirs = make(role, ours.inputs, **shape)
    generator = torch.Generator().manual_seed(1)
    for bs in BATCH_SIZES * 7:
        raw_bs = int(torch.randint(1, bs + 1, (), generator=generator))
        random_step(ours.inputs, generator, raw_bs, bs, ours.draft_tokens, ours.longest)
        theirs.replay(bs)
        for mine, other in zip(ours.metadata(bs), theirs.metadata(bs), strict=True):
            args = fill_args(role, ours, mine, bs)
            for tensor in args.outputs().values():
                tensor.fill_(POISON)
            fill(args)
            yield mine, other


@pytest.mark.parametrize("role", [verify, draft_decode])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_equals_sglangs(role, shape):
    if role is draft_decode and shape.get("draft_tokens") == 2:
        pytest.skip("one draft step: SGLang has no draft-decode graph")
    draft_tokens = shape.get("draft_tokens", DRAFT_TOKENS)
    result = Diff()
    for ours, theirs in steps(role(draft_tokens), **shape):
        compare_captured(ours, theirs, result)
    assert result.first is None, result.first
    assert min(result.compared.values()) >= 7 * sum(BATCH_SIZES)


def test_another_offset_is_found():
    """That the comparison can fail."""
    result = Diff()
    for ours, theirs in steps(verify()._replace(length_offset=DRAFT_TOKENS - 1)):
        compare_captured(ours, theirs, result)
    names = {"cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "nsa_cu_seqlens_k", "page_table_1"}
    assert names <= {name for name, count in result.different.items() if count}


def test_all_draft_steps_have_the_same_values():
    """So one fill and one set of tables can serve them all."""
    harness = make(draft_decode())
    generator = torch.Generator().manual_seed(2)
    random_step(harness.inputs, generator, 3, 3, DRAFT_TOKENS, 512)
    harness.replay(3)
    first, *others = harness.metadata(3)
    assert others
    for other in others:
        result = Diff()
        compare_captured(first, other, result)
        assert result.first is None, result.first


def test_sglang_has_one_tensor_for_both_lengths_of_decode():
    """Which is why seqlens_expanded may be left out of a fill with one row for each request."""
    for metadata in make(draft_decode()).metadata(BATCH_SIZES[0]):
        assert metadata.dsa_seqlens_expanded is metadata.cache_seqlens_int32
