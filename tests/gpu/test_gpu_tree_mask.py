"""Verify's tree mask, through SGLang's own function and the kernels that it takes on this GPU.

python -m pytest tests/gpu/test_gpu_tree_mask.py
"""

from __future__ import annotations

import pytest
import torch
from test_gpu_in_graph import BATCH_SIZES, DRAFT_TOKENS, pair_for_installed
from tree_mask_calls import (
    build,
    draw,
    expect_blocks_of_the_full_mask,
    expect_same_but_for_the_mask,
    expect_slots_of_the_drafts,
    skip_without_the_function,
)

from sglang_nsa_plugin.adapters import install
from sglang_nsa_plugin.state import record

pytestmark = pytest.mark.gpu


def make(**harness: object):
    skip_without_the_function()
    pair = pair_for_installed("flashmla_sparse", role="verify", **harness)
    runner = pair.ours.model_runner
    runner.attn_backend = pair.ours.backend
    runner.model_config.model_is_mrope = False
    return pair


def build_sglangs(pair, bs):
    install.switch("verify", False)
    built = build(pair, bs)
    install.switch("verify", True)
    return built


def test_only_the_mask_is_another_one(state):
    pair = make()
    generator = torch.Generator(device=pair.inputs.seq_lens.device).manual_seed(1)
    for bs in (1, 2, 3, 7, 8, 16) * 5:
        draw(pair, generator, bs)
        ours, sglangs = build(pair, bs), build_sglangs(pair, bs)
        assert ours.custom_mask.numel() == bs * DRAFT_TOKENS**2
        assert sglangs.custom_mask.numel() > 1000 * ours.custom_mask.numel()
        expect_same_but_for_the_mask(ours, sglangs)
        expect_blocks_of_the_full_mask(pair, bs, ours.custom_mask, sglangs.custom_mask)
        slots = getattr(ours, "prepared_out_cache_loc", None)
        if slots is not None:
            expect_slots_of_the_drafts(pair, bs, slots)


def test_the_memory_of_a_step_is_what_the_line_says(state):
    pair = make(context_len=163_840, pool_size=17)
    bs = BATCH_SIZES[-1]
    build(pair, bs)  # compiles what is to be compiled
    saved = peak_of(lambda: build_sglangs(pair, bs)) - peak_of(lambda: build(pair, bs))
    assert f"up to {bs * DRAFT_TOKENS * 163_840:,} bytes less" in record()["tree_mask"]
    assert saved == pytest.approx(bs * DRAFT_TOKENS * 163_840, rel=0.25)  # the allocator rounds up


def peak_of(call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
