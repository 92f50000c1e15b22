"""What the metadata of a whole speculative step costs GPU and host: SGLang's plans, and ours in graphs.

    python -m integration.gpu.step_cost [--requests 64] [--seconds 1.0] [--index-kpool 4]

For each role and each configured context, one of SGLang's backends is taken over and captured, and one
is left as it is. Values are compared first. Writes integration/results/step-cost-GPU-VERSION.json, or
below NSA_RESULTS_DIR. Times are medians in microseconds: ours of the slope between graphs of 1 and of
21 recordings; SGLang's plan is launched from the host, so its kernels' own times are added up. Host
times are those of what runs before a replay. With ``--index-kpool``, of a model that pools the keys of
its index (SGLang 0.5.20 and later), in step-cost-kpool-GPU-VERSION.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from integration import result_files

ARMS = ("ours", "sglang")
CONTEXTS = {"160k": 163_840, "1m": 1 << 20}
LENGTHS = (2_048, 131_072)
DRAFT_TOKENS = 4
PROFILED = 10  # plans of SGLang, for their kernels' times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each role and length")
    parser.add_argument("--index-kpool", type=int, default=1, help="tokens of an index key (default: 1)")
    arguments = parser.parse_args()
    from sglang_nsa_plugin.state import ROLES

    parts = {}
    for name, context in CONTEXTS.items():
        cells = [
            of_role(role, context, arguments.requests, arguments.seconds, arguments.index_kpool)
            for role in ROLES
        ]
        parts[name] = {"context": context, "requests": arguments.requests, "roles": cells}
        for length in LENGTHS:
            for key, where in (("us", "GPU"), ("host_us", "host")):
                us = {arm: round(sum(cell[key][str(length)][arm] for cell in cells), 1) for arm in ARMS}
                print(f"{name}, lengths of {length:,}, µs of the {where}: {us}")
        print(f"{name}, in bytes: { {arm: sum(cell['bytes'][arm] for cell in cells) for arm in ARMS} }")
    stem, command = "step-cost", "python -m integration.gpu.step_cost"
    if arguments.index_kpool > 1:
        stem, command = "step-cost-kpool", f"{command} --index-kpool {arguments.index_kpool}"
    file = f"{stem}-{result_files.gpu_name()}-{version('sglang')}.json"
    result_files.merge(file, command, parts)
    return 0


def of_role(role: str, context: int, requests: int, seconds: float, index_kpool: int) -> dict[str, Any]:
    """The times and bytes of one role's metadata, for one batch size."""
    import torch

    from sglang_nsa_plugin.cli.bench import cases, timing
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.graph_backend import pooled
    from sglang_nsa_plugin.harness.graph_pair import GraphPair

    device = torch.device("cuda", torch.cuda.current_device())
    pair = GraphPair(
        device,
        [requests],
        role=role,
        context_len=context,
        pool_size=requests + 1,
        draft_tokens=DRAFT_TOKENS,
        **pooled(index_kpool),
    )
    cases.write_slots(pair.inputs)
    us, host_us, diff = {}, {}, Diff()
    for length in LENGTHS:
        cases.write_lengths(pair.inputs, cases.Case(requests, length))
        pair.step(requests, diff)
        ours = timing.gpu_times({"ours": pair.recording(requests)}, seconds)["ours"]
        theirs = kernels_us(lambda: pair.theirs.sglang_fill(requests))
        us[str(length)] = {"ours": timing.spread(ours)["median"], "sglang": theirs}
        plans = {"ours": pair.before_replay(requests), "sglang": pair.sglang_before_replay(requests)}
        with pair.stub_process():
            host = timing.host_times(plans, seconds / 2)
        host_us[str(length)] = {arm: timing.spread(host[arm])["median"] for arm in ARMS}
    if diff.first is not None:
        raise RuntimeError(f"{role}: SGLang's values and ours differ: {diff.first}")
    held = {arm: bytes_of(one.steps()) for arm, one in (("ours", pair.ours), ("sglang", pair.theirs))}
    compared = sum(diff.compared.values())
    return {"role": role, "us": us, "host_us": host_us, "bytes": held, "values_compared": compared}


def kernels_us(call: Callable[[], object]) -> float:
    """The time of everything that one call puts on the GPU, without the gaps between."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    total = float(sum(event.self_device_time_total for event in profiled.key_averages()))
    return round(total / PROFILED, 2)


def bytes_of(steps: Iterable[Any]) -> int:
    """Of the tensors that these backends' graphs read, each storage once."""
    storages: dict[int, int] = {}
    for step in steps:
        for held in step.decode_cuda_graph_metadata.values():
            tensors = vars(held).values() if dataclasses.is_dataclass(held) else [held]
            for tensor in filter(is_tensor, tensors):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


if __name__ == "__main__":
    raise SystemExit(main())
