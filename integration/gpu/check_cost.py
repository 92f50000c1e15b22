"""What a shadow check adds to a replay, with the GPU and the cores to itself.

    python -m integration.gpu.check_cost [--json FILE]

Replays the captured fill of 8 requests of 4,000 tokens through SGLang's own backend object, without and
with SGLang's own fill and the comparison after it, in turn. Passes if the one half was checked, and the
other not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sglang_nsa_plugin.cli.bench import timing
from sglang_nsa_plugin.harness.graph_pair import GraphPair
from sglang_nsa_plugin.shadow import Field

REQUESTS, LENGTH = 8, 4_000
ROUNDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    pair = GraphPair(
        torch.device("cuda", 0), (REQUESTS,), check_every=1, pool_size=33, context_len=4_096
    )
    us = cost_of_check(pair)
    checks = pair.shadow_report()[Field.CHECKS]
    found = {"passed": checks == ROUNDS + 1, "checks": checks, "us": us}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    print(found)
    return 0 if found["passed"] else 1


def cost_of_check(pair: GraphPair) -> dict[str, dict[str, dict[str, float]]]:
    """Median and quartiles in microseconds, of replays without and with a check.

    ``host``: of the calls; ``stream``: from the first to the last work that they put on the stream.
    """
    pair.inputs.seq_lens.fill_(LENGTH)
    fills = pair.fills()
    known: dict[int, Any] = {}
    servers = {"unchecked": None, "checked": fills.shadowed}
    samples: dict[str, dict[str, list[float]]] = {name: {"host": [], "stream": []} for name in servers}
    for done in range(ROUNDS + 1):
        for name, shadowed in servers.items():
            fills.shadowed = shadowed
            # An unchecked replay knows its inputs from the one before; a checked one skips nothing.
            fills.fast_path.clear()
            fills.fast_path.update(known if shadowed is None else {})
            for clock, us in _replay_us(pair).items():
                if done:  # the first of each warms up
                    samples[name][clock].append(us)
            known = dict(fills.fast_path) or known
    return {
        name: {clock: timing.spread(taken) for clock, taken in clocks.items()}
        for name, clocks in samples.items()
    }


def _replay_us(pair: GraphPair) -> dict[str, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    before = time.perf_counter()
    pair.replay(REQUESTS)
    host = 1e6 * (time.perf_counter() - before)
    end.record()
    end.synchronize()
    return {"host": host, "stream": 1e3 * begin.elapsed_time(end)}


if __name__ == "__main__":
    raise SystemExit(main())
