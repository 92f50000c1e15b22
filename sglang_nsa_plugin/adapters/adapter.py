"""The one shape of an adapter, whichever generation of SGLang's code it is for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters.hooks import Hook, Requirement, why_replaced
from sglang_nsa_plugin.adapters.outcome import OUTCOME, Outcome
from sglang_nsa_plugin.state import DECODE

# What setting up a fill may raise where it cannot run; torch's out-of-memory error is a RuntimeError.
SET_UP_ERRORS = (RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class Request:
    """What the server asked for, of one role.

    Attributes:
        backend: the implementation, or "auto".
        check_every: fills from one shadow check to the next; 0 for none.
        is_named: whether the role itself was asked for, and not filled because it is in the default.
        keeps_wide_tables: whether SGLang's wide page tables stay where nothing reads them.
    """

    backend: str
    check_every: int
    is_named: bool = True
    keeps_wide_tables: bool = False

    @property
    def asked_for(self) -> str:
        """The implementation without which the start ends; "auto" ends none."""
        return self.backend if self.is_named else options.DEFAULT


class Takeover:
    """The backends that an adapter fills for a role in this process, and on whose request.

    Attributes:
        request: None while no backend is to be taken over: before :meth:`arm` and after :meth:`release`.
        outcome: what came of it.

    Args:
        hand_back: makes a backend SGLang's own again.
        revalidate: makes a backend's next step ask again who fills it.
    """

    def __init__(
        self,
        hand_back: Callable[[Any], None],
        revalidate: Callable[[Any], None] = lambda _: None,
        outcome: Outcome = OUTCOME,
    ) -> None:
        self.request: Request | None = None
        self.outcome = outcome
        self._hand_back = hand_back
        self._revalidate = revalidate
        self._backends: weakref.WeakSet[Any] = weakref.WeakSet()

    def arm(self, request: Request | None) -> None:
        """From now on backends are taken over on this request; with None, no more are."""
        self.request = request

    @property
    def backends(self) -> list[Any]:
        """The backends that are ours."""
        return list(self._backends)

    def add(self, backend: Any) -> None:
        """This backend is ours."""
        self._backends.add(backend)

    def discard(self, backend: Any) -> None:
        """This backend is SGLang's again."""
        self._backends.discard(backend)

    def switch(self, on: bool) -> None:
        """Hands the fill of every backend to SGLang, or takes it back, from the next step on."""
        self.outcome.switch(on)
        for backend in self._backends:
            self._revalidate(backend)

    def fail(self, error: Exception) -> None:
        """Setting up a fill failed: hands every backend back to SGLang.

        Raises:
            BackendUnavailableError: the backend was asked for by name.
        """
        assert self.request is not None  # nothing is set up before
        self.outcome.step_aside_after(self.request.asked_for, error)
        self.release()

    def abandon(self, error: Exception) -> bool:
        """Filling a step in service failed: hands every backend back. Returns False, for "not filled".

        Raises:
            RuntimeError: a captured fill cannot be switched off on the device. It would write over
                SGLang's values in silence, so the process ends instead.
        """
        self.release()
        self.outcome.fail_in_service(error)
        return False

    def release(self) -> None:
        """Hands every backend back to SGLang; none is taken over from now on."""
        self.request = None
        for backend in self.backends:
            self._hand_back(backend)
        self._backends.clear()


@dataclass(frozen=True)
class Parts:
    """What a role needs of SGLang besides what all roles of its adapter need.

    Attributes:
        hooks: the methods of SGLang that are replaced. Each goes when SGLang does its part itself.
        needs: what else of SGLang the adapter calls or reads.
    """

    hooks: tuple[Hook, ...] = ()
    needs: tuple[Requirement, ...] = ()

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """Everything that a release must have to fit."""
        return (*self.hooks, *self.needs)


@dataclass(frozen=True)
class Adapter:
    """How the fill is hooked into one generation of SGLang's code.

    Attributes:
        name: as it is reported and logged.
        common: what every role needs.
        takeovers: what the hooks have taken over, by role. The roles that the adapter can fill.
        why_unfilled: of a backend that was taken over: why no step of it is filled, or None. To be asked
            when start-up is over.
        parts: what a role needs besides, by role. Without it the other roles are filled.
        untried: why roles are filled only if they are asked for by name.
    """

    name: str
    common: Parts
    takeovers: Mapping[str, Takeover]
    why_unfilled: Callable[[Any], str | None]
    parts: Mapping[str, Parts] = field(default_factory=dict)
    untried: Mapping[str, str] = field(default_factory=dict)

    def parts_of(self, role: str) -> Parts:
        """What this role needs besides what every role needs."""
        return self.parts.get(role, Parts())

    def why_not_in_place(self, role: str) -> str | None:
        """Why no step of this role is going to be filled, or None. To be asked when start-up is over.

        Adaptive speculation has several backends; one that is filled is enough.
        """
        replaced = why_replaced((*self.common.hooks, *self.parts_of(role).hooks))
        if replaced is not None:
            return replaced
        reasons = [self.why_unfilled(backend) for backend in self.takeovers[role].backends]
        if not reasons:
            having_one = "" if role == DECODE else ", as EAGLE and MTP have one"
            return f"SGLang made no NSA/DSA attention backend for {role}{having_one}"
        return None if None in reasons else reasons[0]
