"""A backend that the plugin took over beside an untouched one, whichever adapter SGLang has."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

import torch

from sglang_nsa_plugin.harness.backend import HarnessBackend
from sglang_nsa_plugin.harness.process_stubs import activate_plugin
from sglang_nsa_plugin.state import DRAFT_EXTEND

AnyBackend = TypeVar("AnyBackend", bound=HarnessBackend)


class BackendPair(ABC, Generic[AnyBackend]):
    """A taken-over backend and an untouched one over the same inputs.

    Args:
        device: of all tensors.
        batch_sizes: the sizes that graphs are captured for; the inputs hold the largest.
        backend: the implementation, as in ``--nsa-metadata-backend``.
        check_every: as in ``--nsa-metadata-check``.
        role: the one that is filled, as in ``--nsa-metadata-roles``.
        wide_tables: as in ``--nsa-metadata-wide-tables``.
        harness: further arguments of :class:`HarnessBackend`.
    """

    make_backend: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        device: torch.device,
        batch_sizes: Iterable[int],
        backend: str = "auto",
        check_every: int = 0,
        role: str = DRAFT_EXTEND,
        wide_tables: str | None = None,
        **harness: Any,
    ) -> None:
        self.batch_sizes = sorted(batch_sizes)
        activate_plugin(backend, check_every, role, wide_tables)
        if role != DRAFT_EXTEND:
            harness["role"] = role
        self.ours: AnyBackend = self.make_backend(device, max_bs=self.batch_sizes[-1], **harness)
        self.inputs = self.ours.inputs
        self.theirs: AnyBackend = self.make_backend(device, inputs=self.inputs, **harness)
        self._hand_back(self.theirs.backend)

    def stub_process(self) -> contextlib.AbstractContextManager[None]:
        """What SGLang's code lacks outside a launched process. To be entered around its code."""
        return self.ours.stub_process()

    @abstractmethod
    def _hand_back(self, backend: Any) -> None:
        """Gives a backend that the plugin took over back to SGLang."""
