"""One real fill by each implementation: compared with the torch reference, then timed."""

from __future__ import annotations

import time
from typing import Any

import torch

from sglang_nsa_plugin import dispatch, self_test
from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.harness.inputs import make_inputs, random_step
from sglang_nsa_plugin.kernels import cuda
from sglang_nsa_plugin.kernels import torch as reference

REQUESTS, DRAFT_TOKENS, CONTEXT, PAGE, TOPK = 8, 4, 8_192, 64, 2_048
# A fill is timed so many times, or as often as fits into the time.
TIMES, ENOUGH_NS = 20, 300_000_000
# Best first; the CPU twin serves nothing and stands last.
NAMES = ("cuda", "triton", "torch", "cpu")


def check(name: str, no_gpu: str | None) -> dict[str, Any]:
    """What came of one implementation, on the GPU where there is one.

    ``reason`` says why it cannot run or was found wrong; without one, ``us`` is the time of a fill.
    """
    on_gpu = name in ("cuda", "triton") or (name == "torch" and no_gpu is None)
    outcome: dict[str, Any] = {"name": name, "on": "GPU" if on_gpu else "CPU", "us": None}
    outcome["reason"] = (cuda.why_unavailable() if name == "cuda" else None) or (
        no_gpu if on_gpu else None
    )
    if outcome["reason"] is not None:
        return outcome
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    outcome["reason"] = dispatch.why_unavailable(name, device)
    if outcome["reason"] is None:
        outcome.update(_fill(name, device))
    return outcome


def _fill(name: str, device: torch.device) -> dict[str, Any]:
    expected, actual = _case(device), _case(device)
    reference.fill(expected)
    fill = dispatch.choose(name, device).bind(actual)
    fill()
    for output, tensor in actual.outputs().items():
        if not torch.equal(tensor, expected.outputs()[output]):
            why_not = f"it filled {output} with other values than the torch reference; please report it"
            return {"reason": why_not}
    return {"us": round(_microseconds(fill, device), 1)}


def _microseconds(fill: Any, device: torch.device) -> float:
    """Of one fill among many in a row, the device's work and the host's."""
    _wait(device)
    begin, times = time.perf_counter_ns(), 0
    while times < TIMES and time.perf_counter_ns() - begin < ENOUGH_NS:
        fill()
        times += 1
    _wait(device)
    return (time.perf_counter_ns() - begin) / 1000 / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _case(device: torch.device) -> FillArgs:
    """Eight requests of up to 8,192 tokens as a draft-extend step has them; the same at every call."""
    inputs = make_inputs(device, REQUESTS, REQUESTS + 1, CONTEXT, PAGE)
    rng = torch.Generator().manual_seed(0)
    random_step(inputs, rng, REQUESTS, REQUESTS, DRAFT_TOKENS, CONTEXT)
    rows = REQUESTS * DRAFT_TOKENS
    return FillArgs(
        seq_lens=inputs.seq_lens,
        req_pool_indices=inputs.req_pool_indices,
        req_to_token=inputs.req_to_token,
        extend_lens=DRAFT_TOKENS,
        index_topk=TOPK,
        page_size=PAGE,
        **self_test.poisoned_outputs(REQUESTS, rows, CONTEXT, PAGE, device),
    )
