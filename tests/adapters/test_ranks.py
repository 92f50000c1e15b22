"""Ranks that differ in who fills: two real processes, with gloo, on CPU tensors.

A fill takes part in no collective, and both fills leave the same ones to the model. So ranks need not
agree, and asking them to would make a rank that lacks the plugin one that the others wait for.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cpu_pair import on_the_cpu
from isolated import run
from test_plugin import last_line

pytestmark = on_the_cpu

RANK = """
import datetime, json, sys
import torch
import torch.distributed as dist
from sglang_nsa_plugin.adapters import captured_fill, taken_over
from sglang_nsa_plugin.harness.inputs import random_step
from sglang_nsa_plugin.harness.diff import Diff, compare_captured
from sglang_nsa_plugin.harness.graph_pair import GraphPair
from sglang_nsa_plugin.state import record

rank, store, fault, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))

def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")

if rank == 1 and fault == "set-up":
    captured_fill.BackendFills.refresh_derived = no_memory
if rank == 1 and fault == "take-over":
    taken_over.BackendFills = no_memory

class Rank(GraphPair):
    def _capture(self, bs):
        # SGLang's own: a barrier before each warm-up, and the model's sums across ranks in the forward
        batch = self.ours.capture_batch(bs)
        for _ in range(3):
            dist.barrier()
            self.ours.backend.init_forward_metadata_in_graph(batch)
            dist.all_reduce(torch.ones(1))
        return lambda: self.ours.backend.init_forward_metadata_in_graph(batch)

pair = Rank(torch.device("cpu"), (1, 4), backend, draft_tokens=4, context_len=256, pool_size=8)
generator, result = torch.Generator().manual_seed(1), Diff()
for step in range(8):
    bs = (1, 4)[step % 2]
    random_step(pair.inputs, generator, bs, bs, 4, pair.inputs.req_to_token.shape[1])
    pair.ours.replay(bs)
    pair.replay_graph(bs)
    pair.theirs.sglang_fill(bs)
    ours, theirs = (one.backend.decode_cuda_graph_metadata[bs] for one in (pair.ours, pair.theirs))
    compare_captured(ours, theirs, result)
    for lengths in (ours.dsa_seqlens_expanded, ours.cache_seqlens_int32):
        both = [torch.empty_like(lengths) for _ in range(2)]
        dist.all_gather(both, lengths)
        assert torch.equal(*both)
dist.barrier()
print(json.dumps({"first": result.first, "compared": sum(result.compared.values()), **record()}))
"""


def run_two(store, fault: str, backend: str):
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run, RANK, str(r), str(store), fault, backend) for r in (0, 1)]
        return [rank.result() for rank in ranks]


@pytest.mark.parametrize("fault", ["none", "set-up", "take-over"])
def test_ranks_that_differ_in_who_fills_go_on_together(fault, tmp_path):
    ours, other = (json.loads(last_line(done)) for done in run_two(tmp_path / "store", fault, "auto"))
    assert ours["first"] is other["first"] is None
    assert ours["compared"] == other["compared"] > 1_000
    assert (ours["adapter"], ours["replays"]) == ("in-graph", 8)
    assert (other["adapter"], other["replays"]) == (("in-graph", 8) if fault == "none" else (None, 0))


def test_a_rank_that_cannot_do_what_was_asked_by_name_ends(tmp_path):
    """The others end with it: SGLang's launcher ends all when one scheduler's start fails."""
    waiting, ended = run_two(tmp_path / "store", "set-up", "torch")
    assert ended.returncode != 0
    assert "--nsa-metadata-backend torch was asked for by name and cannot be used" in ended.stderr
    assert waiting.returncode != 0
    # gloo's words for a rank that is gone: closed, or reset where something was still under way
    assert re.search("Connection (closed|reset) by peer", waiting.stderr)
