"""Replays of captured graphs of one role on changing random batches, every one shadow-checked.

    python -m integration.gpu.soak [--role verify] [--replays 1000000] [--processes 8] [--json FILE]
    python -m integration.gpu.soak --index-kpool 4 --role verify --replays 100000

The second is of a model with a pooled index, from SGLang 0.5.20 on.

Each process takes over SGLang's own backend object, captures a graph for each batch size and replays
them. For each replay SGLang's own fill runs, too, and every live value is compared on the device. A run
may be split: --seed chooses other batches. Without a GPU the CPU runs again what the graphs would hold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

BATCH_SIZES = (1, 2, 4, 8, 16)
ROLES = ("draft-extend", "verify", "draft-decode", "decode")
# Two processes have each: draft tokens, context, how SGLang decodes.
SETTINGS = (
    {"draft_tokens": 4, "context_len": 4_096, "decode_impl": "flashmla_sparse"},
    {"draft_tokens": 2, "context_len": 40_000, "decode_impl": "flashmla_sparse"},
    {"draft_tokens": 6, "context_len": 4_096, "decode_impl": "flashmla_kv"},
    {"draft_tokens": 3, "context_len": 163_840, "decode_impl": "flashmla_sparse"},
)
POOL = 33
NEW_SLOTS_EVERY = 100
PROGRESS_EVERY = 50_000
KEPT = ("replays", "checks", "fallbacks", "mismatches", "first_mismatch")  # of the plugin's record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replays", type=int, default=1_000_000, help="of all processes together")
    parser.add_argument("--processes", type=int, default=2 * len(SETTINGS))
    parser.add_argument("--role", choices=ROLES, default=ROLES[0])
    parser.add_argument("--index-kpool", type=int, default=1, help="tokens of an index key (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches of the first process")
    parser.add_argument("--time-limit-s", type=float, default=500.0, help="longer is a hang, and fails")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    begin = time.monotonic()
    each = -(-arguments.replays // arguments.processes)
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        jobs = [
            (number, each, arguments.role, arguments.seed + number, arguments.index_kpool)
            for number in range(arguments.processes)
        ]
        runs = pool.starmap_async(soak, jobs).get(arguments.time_limit_s)
    found = {
        "role": arguments.role,
        "index_kpool": arguments.index_kpool,
        "passed": all(run["passed"] for run in runs),
        "replays": sum(run["record"]["replays"] for run in runs),
        "checks": sum(run["record"]["checks"] for run in runs),
        "mismatches": sum(run["record"]["mismatches"] for run in runs),
        "values_compared": sum(run["values_compared"] for run in runs),
        "seconds": round(time.monotonic() - begin, 1),
        "runs": runs,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    print({name: value for name, value in found.items() if name != "runs"})
    return 0 if found["passed"] else 1


def soak(number: int, replays: int, role: str, seed: int, index_kpool: int = 1) -> dict[str, Any]:
    """One process's replays, on random batches drawn on the device."""
    import torch

    from sglang_nsa_plugin.harness.graph_pair import GraphPair
    from sglang_nsa_plugin.harness.inputs import random_step
    from sglang_nsa_plugin.shadow import Field
    from sglang_nsa_plugin.state import record

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    settings = settings_of(role, number, index_kpool)
    draft_tokens = int(str(settings["draft_tokens"]))
    pair = GraphPair(device, BATCH_SIZES, role=role, check_every=1, pool_size=POOL, **settings)
    on_device = torch.Generator(device).manual_seed(seed)
    on_host = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, BATCH_SIZES[-1] + 1, (replays,), generator=on_host).tolist()
    # Verify's rows reach beyond seq_lens, by the draft tokens.
    longest = pair.inputs.req_to_token.shape[1] - (draft_tokens if role == "verify" else 0)
    for step, raw_bs in enumerate(sizes):
        bs = pair.bucket(raw_bs)
        new_slots = step % NEW_SLOTS_EVERY == 0
        random_step(pair.inputs, on_device, raw_bs, bs, draft_tokens, longest, new_slots)
        pair.replay(bs)
        if step % PROGRESS_EVERY == 0:
            print(f"process {number}: {step:,} of {replays:,} replays", flush=True)
    shadowed = pair.fills().shadowed
    assert shadowed is not None
    shadowed.compare_last()  # where a replay is compared before the next one
    if device.type == "cuda":
        torch.cuda.synchronize()
    report = pair.shadow_report()
    found = record()["roles"][role]
    passed = (
        found["replays"] == found["checks"] == replays == report[Field.CHECKS]
        and report[Field.DIFFERENT] == 0
        and not found["fallbacks"]
    )
    return {
        "passed": passed,
        "settings": settings,
        "values_compared": report[Field.VALUES],
        "record": {name: found[name] for name in KEPT},
    }


def settings_of(role: str, number: int, index_kpool: int = 1) -> dict[str, Any]:
    """Those of one process. With 2 draft tokens there is one draft step, and no draft-decode: 5 then,
    with which SGLang leaves schedules as they were captured.
    """
    from sglang_nsa_plugin.harness.graph_backend import pooled

    settings: dict[str, Any] = dict(SETTINGS[number % len(SETTINGS)])
    if role == "draft-decode" and settings["draft_tokens"] == 2:
        settings["draft_tokens"] = 5
    return settings | pooled(index_kpool)


if __name__ == "__main__":
    raise SystemExit(main())
