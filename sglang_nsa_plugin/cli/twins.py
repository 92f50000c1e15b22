"""The backend of the installed SGLang beside an untouched one, whichever adapter it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def make_twin(
    device: torch.device, batch_sizes: Iterable[int], backend: str = "auto", **rig: Any
) -> Any:
    """A :class:`Twin` where draft-extend runs in graphs, else an :class:`EagerTwin`."""
    from sglang_nsa_plugin.adapters import in_graph

    if in_graph.is_generation():
        from sglang_nsa_plugin.cli.replay import Twin

        return Twin(device, batch_sizes, backend, **rig)
    from sglang_nsa_plugin.cli.eager_twin import EagerTwin

    return EagerTwin(device, batch_sizes, backend, **rig)
