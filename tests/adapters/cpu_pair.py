"""What the tests of the in-graph adapter share: two of SGLang's backends, one of them taken over."""

from __future__ import annotations

import pytest
import torch

CPU = torch.device("cpu")
BATCH_SIZES = (1, 2, 4, 8)
DRAFT_TOKENS = 4

on_the_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, tests/gpu/test_gpu_in_graph.py covers the adapter"
)


def make_pair(backend: str = "auto", **harness: object):
    skip_unless_captured()
    from sglang_nsa_plugin.harness.graph_pair import GraphPair

    settings = {"draft_tokens": DRAFT_TOKENS, "context_len": 512, "pool_size": 12, **harness}
    return GraphPair(CPU, BATCH_SIZES, backend, **settings)


def skip_unless_captured() -> None:
    from sglang_nsa_plugin.adapters import in_graph

    if not in_graph.is_generation():
        pytest.skip("this SGLang does not capture DSA's draft-extend in graphs")


def random_batch(pair, generator, raw_bs=None):
    from sglang_nsa_plugin.harness.inputs import random_step

    raw_bs = raw_bs or int(torch.randint(1, BATCH_SIZES[-1] + 1, (), generator=generator))
    bs = pair.bucket(raw_bs)
    longest = pair.inputs.req_to_token.shape[1]
    random_step(pair.inputs, generator, raw_bs, bs, pair.ours.draft_tokens, longest)
    return bs
