"""The pair of backends that fits the installed SGLang, and the roles that it can have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sglang_nsa_plugin.adapters import in_graph
from sglang_nsa_plugin.adapters.install import adapter_for_installed
from sglang_nsa_plugin.harness.eager_pair import EagerPair
from sglang_nsa_plugin.harness.graph_pair import GraphPair
from sglang_nsa_plugin.harness.process_stubs import activate_plugin
from sglang_nsa_plugin.state import DRAFT_EXTEND, STATES


def pair_for_installed(
    device: torch.device,
    batch_sizes: Iterable[int],
    backend: str = "auto",
    role: str = DRAFT_EXTEND,
    **harness: Any,
) -> Any:
    """A :class:`GraphPair` where this role runs in graphs, else an :class:`EagerPair`."""
    runs_in_graphs = in_graph.is_generation() or role != DRAFT_EXTEND
    pair = GraphPair if runs_in_graphs else EagerPair
    return pair(device, batch_sizes, backend, role=role, **harness)


def why_declined(role: str) -> str | None:
    """Why the plugin fills nothing of this role with the installed SGLang, in its own words, or None."""
    activate_plugin("auto", 0, role)
    takeover = adapter_for_installed().takeovers.get(role)
    is_armed = takeover is not None and takeover.request is not None
    return None if is_armed else STATES[role].reason
