"""SGLang's DSA backend gets a tree mask of requests x drafts x context bytes a step, and reads none.

    python unread_tree_mask.py [--requests 64] [--drafts 4] [--context 163840]

Needs an NVIDIA GPU and an installed SGLang, 0.5.17 or later; no model, no server, no other package. It
looks whether the backend says what mask it wants, and builds the tree of a step with the mask that it
gets now and with a short one. Exit code: 0 when the backend says so, 1 when it does not.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

import torch

Tree = tuple[torch.Tensor, ...]


def main() -> int:
    """Prints both masks' sizes and times, and whether the rest of the tree is the same."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4, help="--speculative-num-draft-tokens")
    parser.add_argument("--context", type=int, default=163_840, help="the model's or --context-length")
    asked = parser.parse_args()
    print(
        f"SGLang {version('sglang')}, {torch.cuda.get_device_name()}: {asked.requests} requests, "
        f"{asked.drafts} draft tokens, context {asked.context:,}"
    )
    trees = {}
    for mode in ("FULL_MASK", "QLEN_ONLY"):
        trees[mode] = tree(mode, asked.requests, asked.drafts, asked.context)
        mask = trees[mode][0]
        us = us_of(mode, asked.requests, asked.drafts, asked.context)
        print(f"{mode}: {mask.numel() * mask.element_size():,} bytes, the whole tree {us:.0f} us")
    full, short = (each[1:] for each in trees.values())
    is_same = all(a.equal(b) for a, b in zip(full, short, strict=True))
    print(f"positions, links and tokens of the tree: {'the same' if is_same else 'DIFFERENT'}")
    is_right = says_which_mask()
    print(
        "right: the backend says which mask it wants"
        if is_right
        else "WRONG: the backend has no verify_mask, so it gets FULL_MASK, which it does not read"
    )
    return 0 if is_right and is_same else 1


def says_which_mask() -> bool:
    """Whether the DSA backend has a ``verify_mask`` of its own; the base class's is None."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    return DeepseekSparseAttnBackend.verify_mask is not AttentionBackend.verify_mask


def tree(mode: str, requests: int, drafts: int, context: int, device: str = "cuda") -> Tree:
    """What ``build_eagle_verify_input`` has built with this mask, for a chain of drafts (top-k 1)."""
    from sglang.srt.speculative.eagle_utils import TreeMaskMode, build_tree_kernel_efficient

    steps = drafts - 1
    tokens = torch.arange(requests * steps, device=device).view(requests, steps)
    parents = torch.arange(-1, steps - 1, device=device).repeat(requests, 1)
    chosen = torch.arange(steps, device=device).repeat(requests, 1)
    lengths = torch.full((requests,), 250, dtype=torch.int64, device=device)
    made: Tree = build_tree_kernel_efficient(
        torch.arange(requests, device=device),
        parents,
        chosen,
        tokens,
        lengths,
        0 if mode == "QLEN_ONLY" else requests * context,
        1,
        steps,
        drafts,
        getattr(TreeMaskMode, mode),
    )
    return made


def us_of(mode: str, requests: int, drafts: int, context: int, times: int = 20) -> float:
    """Microseconds on the GPU of one tree, its small launches included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        tree(mode, requests, drafts, context)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / times


if __name__ == "__main__":
    sys.exit(main())
