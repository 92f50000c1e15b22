"""The backend of the installed SGLang beside an untouched one, whichever adapter it has."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

import torch

from sglang_nsa_plugin.harness.backend import HarnessBackend
from sglang_nsa_plugin.harness.process_stubs import activate_plugin

AnyBackend = TypeVar("AnyBackend", bound=HarnessBackend)


class BackendPair(ABC, Generic[AnyBackend]):
    """A taken-over backend and an untouched one over the same inputs.

    Args:
        device: where the tensors lie.
        batch_sizes: the largest is as many requests as the inputs hold; graphs have one of them.
        backend: implementation to fill with, as ``--nsa-metadata-backend``.
        check_every: as ``--nsa-metadata-check``.
        rig: further arguments of :class:`HarnessBackend`.
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
        self.ours: AnyBackend = self.make_rig(device, max_bs=self.batch_sizes[-1], **rig)
        self.inputs = self.ours.inputs
        self.theirs: AnyBackend = self.make_rig(device, inputs=self.inputs, **rig)
        self._hand_back(self.theirs.backend)

    def stub_process(self) -> contextlib.AbstractContextManager[None]:
        """What SGLang's code lacks outside a launched process, for calls that are timed."""
        return self.ours.stub_process()

    @abstractmethod
    def _hand_back(self, backend: Any) -> None:
        """Makes a backend that the plugin took over SGLang's own again."""
