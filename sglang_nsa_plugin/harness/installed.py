"""The pair of backends that fits the installed SGLang."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import in_graph
from sglang_nsa_plugin.harness.eager_pair import EagerPair
from sglang_nsa_plugin.harness.graph_pair import GraphPair


def pair_for_installed(
    device: torch.device, batch_sizes: Iterable[int], backend: str = "auto", **harness: Any
) -> Any:
    """A :class:`GraphPair` where draft-extend runs in graphs, else an :class:`EagerPair`."""
    if in_graph.is_generation():
        return GraphPair(device, batch_sizes, backend, **harness)
    return EagerPair(device, batch_sizes, backend, **harness)
