"""Calls SGLang's function that builds verify's input, on a chain of drafts as its own draft makes it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# What verify reads of its input; the last ones are there from 0.5.22 on, and made ahead or not at all.
READ = ("draft_token", "positions", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling")


def skip_without_the_function() -> None:
    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.tree_mask import HOOK

    misfits = hooks.misfits([HOOK])
    if misfits:
        pytest.skip(f"the tree mask stays this SGLang's: {misfits[0]}")


def draw(pair: Any, generator: torch.Generator, bs: int) -> None:
    """Random requests whose drafts stay within the context, as a scheduler's do."""
    from sglang_nsa_plugin.harness.inputs import random_step

    draft_tokens = pair.ours.draft_tokens
    longest = pair.ours.backend.max_context_len - draft_tokens
    random_step(pair.inputs, generator, bs, bs, draft_tokens, longest)


def build(pair: Any, bs: int, **changes: Any) -> Any:
    """Builds the input as SGLang's EAGLE worker does, for the first requests of the pair's inputs.

    The worker's own name for the function is called: the hook has to reach it.
    """
    from sglang.srt.speculative import eagle_worker_v2

    args, kwargs = arguments(pair, bs, **changes)
    return eagle_worker_v2.build_eagle_verify_input(*args, **kwargs)


def arguments(pair: Any, bs: int, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    draft_tokens, drafts = pair.ours.draft_tokens, _chain(pair, bs)
    bonus_tokens = torch.arange(bs, device=drafts[2].device)
    by_name = {
        "target_worker": SimpleNamespace(model_runner=pair.ours.model_runner),
        "topk": 1,
        "num_steps": draft_tokens - 1,
        "num_draft_tokens": draft_tokens,
        "tree_mask_mode": TreeMaskMode.FULL_MASK,
        "device": str(pair.inputs.seq_lens.device),
        **changes,
    }
    return (batch(pair, bs), SimpleNamespace(bonus_tokens=bonus_tokens), *drafts, None), by_name


def batch(pair: Any, bs: int) -> SimpleNamespace:
    inputs = pair.inputs
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_idle=lambda: False),
        seq_lens=inputs.seq_lens[:bs],
        seq_lens_sum=None,
        req_pool_indices=inputs.req_pool_indices[:bs],
        req_to_token_pool=SimpleNamespace(req_to_token=inputs.req_to_token),
        multimodal_inputs=[None] * bs,
    )


def _chain(pair: Any, bs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parents, ranks and tokens of the drafts, of which each step has made one for each request."""
    from sglang.srt.speculative.eagle_utils import organize_draft_results

    steps, device = pair.ours.draft_tokens - 1, pair.inputs.seq_lens.device
    scores = [torch.full((bs, 1, 1), 0.9**step, device=device) for step in range(steps)]
    tokens = [torch.arange(bs, device=device).view(bs, 1) + 100 * step for step in range(1, steps + 1)]
    first = torch.tensor([[-1, 0]], device=device).repeat(bs, 1)
    later = [torch.full((bs, 1), step, device=device) for step in range(1, steps)]
    return organize_draft_results(scores, tokens, [first, *later], steps + 1)


def expect_same_but_for_the_mask(ours: Any, sglangs: Any) -> None:
    for field in dataclasses.fields(sglangs):
        one, other = getattr(ours, field.name), getattr(sglangs, field.name)
        if field.name in ("custom_mask", "prepared_out_cache_loc"):
            continue
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name
    assert all(getattr(ours, name).numel() for name in READ)


def expect_blocks_of_the_full_mask(pair: Any, bs: int, short: torch.Tensor, full: torch.Tensor) -> None:
    """The short mask holds what the full one says of the draft tokens among themselves."""
    draft_tokens, begin = pair.ours.draft_tokens, 0
    short = short.view(bs, draft_tokens, draft_tokens)
    for request, length in enumerate(pair.inputs.seq_lens[:bs].tolist()):
        rows = full[begin : begin + draft_tokens * (length + draft_tokens)].view(draft_tokens, -1)
        assert torch.equal(short[request], rows[:, length:])
        begin += rows.numel()


def expect_slots_of_the_drafts(pair: Any, bs: int, slots: torch.Tensor) -> None:
    """From 0.5.22 on the launch also looks up where verify writes its keys and values."""
    inputs = pair.inputs
    offsets = torch.arange(pair.ours.draft_tokens, device=slots.device)
    columns = inputs.seq_lens[:bs, None] + offsets
    rows = inputs.req_to_token[inputs.req_pool_indices[:bs].long()]
    assert slots.dtype == torch.int64
    assert torch.equal(slots.view(bs, -1), rows.gather(1, columns.long()).long())
