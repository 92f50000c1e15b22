"""What differs between SGLang releases for those who start servers: options, and where kernels are kept.

    python3 -m integration.releases.differences caches     # those that are there, below ~

This is the one place for it. Elsewhere nothing in integration/ asks for a version, but for what
`install_sglang` installs and the generations that `matrix` names. The probe, which runs inside a server,
asks what the loaded SGLang has.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from integration.releases.install_sglang import LATER, release_key

Spelling = TypeVar("Spelling")
# Each: (first release, last release, what it says).
Table = tuple[tuple[str, str, Spelling], ...]

SPARSE: Table[str] = (("0.5.11", "0.5.12.post1", "nsa"), ("0.5.13", LATER, "dsa"))
# The old spelling of these two was kept until 0.5.19; from 0.5.20 on it is short for several options.
LARGEST_GRAPH: Table[str] = (
    ("0.5.11", "0.5.13.post1", "--cuda-graph-max-bs"),
    ("0.5.14", LATER, "--cuda-graph-max-bs-decode"),
)
GRAPH_SIZES: Table[str] = (
    ("0.5.11", "0.5.13.post1", "--cuda-graph-bs"),
    ("0.5.14", LATER, "--cuda-graph-bs-decode"),
)
NO_PREFILL_GRAPH: Table[str] = (
    ("0.5.11", "0.5.13.post1", "--disable-piecewise-cuda-graph"),
    ("0.5.14", LATER, "--disable-prefill-cuda-graph"),
)
# Before the number of ranks. 0.5.22 and 0.5.23 take the old spelling as well, and warn.
DATA_PARALLEL_ATTENTION: Table[tuple[str, ...]] = (
    ("0.5.11", "0.5.21", ("--enable-dp-attention", "--dp")),
    ("0.5.22", LATER, ("--attn-dp-size",)),
)
# Whether models with a pooled index (GLM-5.3-Flash) are known.
HAS_POOLED_INDEX: Table[bool] = (("0.5.11", "0.5.19", False), ("0.5.20", LATER, True))
# Folders below the home folder with the kernels that a server compiled.
KERNEL_CACHES: Table[tuple[str, ...]] = (
    ("0.5.11", "0.5.17", (".triton", ".cache/tvm-ffi", ".cache/flashinfer", ".cache/deep_gemm")),
    ("0.5.18", LATER, (".cache/sglang", ".cache/tvm-ffi")),
)
TRITON_CACHE: Table[str] = (
    ("0.5.11", "0.5.17", ".triton/cache"),
    ("0.5.18", LATER, ".cache/sglang/triton"),
)


def of(table: Table[Spelling], release: str | None = None) -> Spelling:
    """What a table says of a release; without one, of the installed SGLang."""
    release = release or version("sglang")
    key = release_key(release)
    for first, last, said in table:
        if release_key(first) <= key <= release_key(last):
            return said
    raise ValueError(f"release: must be {table[0][0]} or newer, got {release}")


def decode_graphs(largest: int, sizes: tuple[int, ...] = (), release: str | None = None) -> list[str]:
    """The options for the batch sizes of the graphs of a speculative step."""
    listed = [of(GRAPH_SIZES, release), *map(str, sizes)] if sizes else []
    return [of(LARGEST_GRAPH, release), str(largest), *listed]


def sparse_backend(name: str, release: str | None = None) -> list[str]:
    """The options for the sparse attention of prefill and of decode."""
    prefix = f"--{of(SPARSE, release)}"
    return [f"{prefix}-prefill-backend", name, f"{prefix}-decode-backend", name]


def data_parallel_attention(ranks: int, release: str | None = None) -> list[str]:
    """The options for attention that is data parallel over so many ranks."""
    return [*of(DATA_PARALLEL_ATTENTION, release), str(ranks)]


if __name__ == "__main__":
    if sys.argv[1:] != ["caches"]:
        raise SystemExit("usage: python3 -m integration.releases.differences caches")
    print(*(each for each in of(KERNEL_CACHES) if (Path.home() / each).is_dir()))
