"""The backend of the installed SGLang beside an untouched one, whichever adapter it has."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

import torch

from sglang_nsa_plugin.cli.base_rig import Rig
from sglang_nsa_plugin.cli.stand_ins import activate_plugin

AnyRig = TypeVar("AnyRig", bound=Rig)


class TwoBackends(ABC, Generic[AnyRig]):
    """A taken-over backend and an untouched one over the same inputs.

    Args:
        device: where the tensors lie.
        batch_sizes: the largest is as many requests as the inputs hold; graphs have one of them.
        backend: implementation to fill with, as ``--nsa-metadata-backend``.
        check_every: as ``--nsa-metadata-check``.
        rig: further arguments of :class:`Rig`.
    """

    make_rig: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        device: torch.device,
        batch_sizes: Iterable[int],
        backend: str = "auto",
        check_every: int = 0,
        **rig: Any,
    ) -> None:
        self.batch_sizes = sorted(batch_sizes)
        activate_plugin(backend, check_every)
        self.ours: AnyRig = self.make_rig(device, max_bs=self.batch_sizes[-1], **rig)
        self.inputs = self.ours.inputs
        self.theirs: AnyRig = self.make_rig(device, inputs=self.inputs, **rig)
        self._hand_back(self.theirs.backend)

    def stand_ins(self) -> contextlib.AbstractContextManager[None]:
        """What SGLang's code lacks outside a launched process, for calls that are timed."""
        return self.ours.stand_ins()

    @abstractmethod
    def _hand_back(self, backend: Any) -> None:
        """Makes a backend that the plugin took over SGLang's own again."""


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
