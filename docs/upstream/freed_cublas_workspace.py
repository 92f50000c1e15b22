"""Dropping one CUDA graph frees the cuBLAS workspace that another one, of the same stream, still uses.

    python freed_cublas_workspace.py [CASE]

Needs an NVIDIA GPU and PyTorch with CUDA; no SGLang, no model, no other package.

Two graphs A and B of the same product are captured on one stream, each after a warm-up there. cuBLAS
splits this product's sum and adds the parts up in its workspace. Each case, in a process of its own,
does something to A and replays B.
Exit code: 0 when all replays are right, 1 when some are not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from typing import Any

import torch

CASES = ("keep", "drop", "drop+empty", "drop+reuse", "drop+capture")  # what is done to A, and then
MIB = 1 << 20
Graph = tuple[torch.cuda.CUDAGraph, torch.Tensor]


def main() -> int:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="?", choices=CASES, help="run this one here and print JSON")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{parser.prog} needs an NVIDIA GPU and PyTorch with CUDA.", file=sys.stderr)
        return 2
    if asked.case is not None:
        found = replayed(asked.case)
        print(json.dumps(found), flush=True)
        return 0 if found["replay"] == "right" else 1
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    results = {case: in_a_process(case) for case in CASES}
    for case, result in results.items():
        print(f"{case:12}  {told(result)}")
    return 0 if all(result.get("replay") == "right" for result in results.values()) else 1


def in_a_process(case: str) -> dict[str, Any]:
    """What the case found. An illegal memory access ends the CUDA context of its process."""
    done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=False)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if printed:
        return dict(json.loads(printed[-1]))
    said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    return {"replay": f"exit code {done.returncode}, {said[-1]}"}


def told(result: dict[str, Any]) -> str:
    """One case's line."""
    told_of = [f"replay of B: {result['replay']}"]
    if "freed_mib" in result:
        told_of.insert(0, f"{result['freed_mib']} MiB freed, {result['unmapped_mib']} unmapped")
    if "written" in result:
        told_of.append(f"{result['written']:,} bytes of other tensors written")
    return "; ".join(told_of)


def replayed(case: str) -> dict[str, Any]:
    """Captures A and B, does to A what the case says, and replays B."""
    torch.manual_seed(0)
    left = torch.randn(16, 16384, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(16384, 576, device="cuda", dtype=torch.bfloat16)
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture() -> Graph:
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.mm(left, right)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            product = torch.mm(left, right)
        return graph, product

    a, of_a = capture()
    b, of_b = capture()
    b.replay()
    torch.cuda.synchronize()
    expected = of_b.clone()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    if case != "keep":
        del a, of_a
        gc.collect()
    found: dict[str, Any] = {"freed_mib": (allocated - torch.cuda.memory_allocated()) // MIB}
    if case == "drop+empty":
        torch.cuda.empty_cache()
    found["unmapped_mib"] = (reserved - torch.cuda.memory_reserved()) // MIB
    others = []
    if case == "drop+reuse":
        sizes = [8, 32, 1, 4, 16] * 2
        others = [torch.zeros(mib * MIB, device="cuda", dtype=torch.uint8) for mib in sizes]
    if case == "drop+capture":
        capture()
    of_b.zero_()
    torch.cuda.synchronize()
    try:
        b.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {**found, "replay": str(error).partition("\n")[0]}
    found["replay"] = "right" if torch.equal(of_b, expected) else "WRONG"
    if others:
        found["written"] = sum(int(each.count_nonzero()) for each in others)
    return found


if __name__ == "__main__":
    sys.exit(main())
