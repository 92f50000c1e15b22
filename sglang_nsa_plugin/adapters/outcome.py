"""Who fills a role's metadata in this process: one outcome with three states, logged on change."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from enum import Enum

from sglang_nsa_plugin import options
from sglang_nsa_plugin.adapters.releases import SGLANG
from sglang_nsa_plugin.containment import described
from sglang_nsa_plugin.dispatch import BackendUnavailableError, Choice
from sglang_nsa_plugin.log import logger_of
from sglang_nsa_plugin.shadow import Difference
from sglang_nsa_plugin.state import DRAFT_EXTEND, NOT_ASKED, STATE, STATES, VERSION, State

logger = logger_of(__name__)

WAITING = "waiting for the attention backend"


class Phase(Enum):
    """The states of an outcome, and what leads from one to the other.

    idle: SGLang fills, and the reason says why. The start of every process, and the state to which a
    server comes that asks for nothing, is not supported, or whose fill could not be set up.

    active: the plugin fills the backends that it took over, from the first one on.

    failed: the shadow check found a difference, or filling a step raised an error. SGLang fills every
    step for the life of the process.
    """

    IDLE = "idle"
    ACTIVE = "active"
    FAILED = "failed"


class Outcome:
    """The one place where it is decided for a role; ``state`` mirrors it for reports."""

    def __init__(self, state: State = STATE) -> None:
        self.state = state
        self.phase = Phase.IDLE
        self.reason = state.reason
        self.adapter: str | None = None
        self.backend: str | None = None
        self.is_switched_on = True
        self.is_in_service = False  # from the end of a start-up that put the fill in place
        self.why_failed = ""

    @property
    def has_failed(self) -> bool:
        """Whether this process has left its fill to SGLang for good."""
        return self.phase is Phase.FAILED

    @property
    def is_undecided(self) -> bool:
        """Whether nothing of the plugin has run in this process that decides who fills."""
        return self.reason == NOT_ASKED

    @property
    def is_open(self) -> bool:
        """Whether the plugin is set up, so that only the end of start-up shows whether it fills."""
        return self.phase is Phase.ACTIVE or self.reason == WAITING

    def report_waiting(self, adapter: str) -> None:
        """The hooks of this adapter are in place, and SGLang has not made its backend yet."""
        if self.phase is Phase.IDLE:
            self._set(Phase.IDLE, WAITING, adapter)

    def report_active(
        self,
        adapter: str,
        choice: Choice,
        makes_schedule: bool | None = None,
        warning: str | None = None,
    ) -> None:
        """The plugin fills a backend's metadata from now on.

        ``makes_schedule`` says whether the same launch makes DeepGEMM's schedule, or DeepGEMM itself;
        None where no fill ever does. ``warning`` is logged, too. A server may have several such
        backends, of adaptive speculation for example: the first is logged.
        """
        if self.phase is not Phase.IDLE:
            return
        self._set(Phase.ACTIVE, choice.reason, adapter, choice.name)
        schedule = ""
        if makes_schedule is not None:
            self.state.mqa_schedule = choice.name if makes_schedule else "DeepGEMM"
            schedule = f"; MQA schedule by {self.state.mqa_schedule}"
        logger.info(
            "sglang-nsa-plugin %s: %s: adapter %s, implementation %s: %s%s",
            VERSION,
            self.state.role,
            adapter,
            choice.name,
            choice.reason,
            schedule,
        )
        if warning is not None:
            logger.warning("sglang-nsa-plugin %s: %s", VERSION, warning)

    def why_not_switchable(self, on: bool) -> str | None:
        """Why the fill cannot be switched in service, or None. Only an active fill can."""
        if self.phase is Phase.IDLE:
            return f"the plugin fills nothing here: {self.reason}"
        if self.has_failed and on:
            return f"{self.why_failed}, so SGLang fills until this process ends"
        return None

    def switch(self, on: bool) -> None:
        """Somebody switched the fill in service; the next step is filled accordingly.

        After a failure SGLang fills already: the position stays, because nobody could switch it back.
        """
        if self.has_failed:
            logger.info(
                "sglang-nsa-plugin %s: %s, so SGLang already fills %s metadata; its switch stays as "
                "it is",
                VERSION,
                self.why_failed,
                self.state.role,
            )
            return
        self.is_switched_on = self.state.switched_on = on
        logger.info(
            "sglang-nsa-plugin %s: switched %s in service: %s %s metadata from now on",
            VERSION,
            "on" if on else "off",
            "the plugin fills" if on else "SGLang fills",
            self.state.role,
        )

    def report_in_place(self) -> None:
        """Start-up is over, and the steps of this role are filled by the plugin."""
        self.state.in_place = self.is_in_service = True
        sizes = sorted(self.state.captures)
        where = (
            f"in {len(sizes)} CUDA graphs, batch sizes {sizes[0]} to {sizes[-1]}"
            if sizes
            else "every step"
        )
        logger.info(
            "sglang-nsa-plugin %s: %s is in place: adapter %s, implementation %s, %s",
            VERSION,
            self.state.role,
            self.adapter,
            self.backend,
            where,
        )

    def report_idle(self, reason: str) -> None:
        """SGLang fills the metadata itself; the same reason is logged once."""
        if self._become_idle(reason):
            _log_idle(reason, self.state.role)

    def _become_idle(self, reason: str) -> bool:
        """Whether that is news."""
        if self.phase is Phase.IDLE and self.reason == reason:
            return False
        if not self.has_failed:
            self._set(Phase.IDLE, reason)
            self.state.in_place = False
            self.state.captures.clear()
        return True

    def step_aside(self, asked_for: str, why_not: str) -> None:
        """Becomes idle where the choice of a backend was left to the plugin, and in service.

        Adaptive speculation makes backends in service.

        Raises:
            BackendUnavailableError: the backend was asked for by name, and the server is starting.
        """
        self.end_if_named(asked_for, why_not)
        self.report_idle(why_not)

    def end_if_named(self, asked_for: str, why_not: str) -> None:
        """Ends a server that starts and asked for a backend by name."""
        if asked_for != options.DEFAULT and not self.is_in_service:
            raise BackendUnavailableError(
                f"{options.FLAG} {asked_for} was asked for by name and cannot be used: {why_not}. "
                f"Use 'auto' or 'off' to serve with SGLang's own fill"
            )

    def step_aside_after(self, asked_for: str, error: Exception) -> None:
        """The same after an error while a fill was set up.

        Raises:
            BackendUnavailableError: the backend was asked for by name, and the server is starting.
        """
        if isinstance(error, BackendUnavailableError) and not self.is_in_service:
            raise error  # its message is complete
        what = textwrap.shorten(str(error), 300)
        self.step_aside(asked_for, f"the fill could not be set up: {type(error).__name__}: {what}")

    def fail(self, difference: Difference) -> None:
        """The shadow check found this difference."""
        self.phase = Phase.FAILED  # first: whatever fails below, this is certain
        self.state.mismatches += difference.count
        self.state.first_mismatch = str(difference)
        self._fail("the shadow check found a difference", str(difference))

    def fail_in_service(self, error: Exception) -> None:
        """Filling a step raised this error."""
        self._fail("filling a step failed", described(error))

    def _fail(self, why: str, what: str) -> None:
        self.phase, self.why_failed = Phase.FAILED, why
        self.reason = self.state.reason = f"{why}: {what}"
        self.state.in_place = False
        logger.error(
            "sglang-nsa-plugin %s: %s: %s. SGLang %s, adapter %s, implementation %s. From now on this "
            "process serves %s through SGLang's own fill; please report this line",
            VERSION,
            why,
            what,
            SGLANG,
            self.adapter,
            self.backend,
            self.state.role,
        )

    def _set(
        self, phase: Phase, reason: str, adapter: str | None = None, backend: str | None = None
    ) -> None:
        self.phase, self.reason, self.adapter, self.backend = phase, reason, adapter, backend
        self.state.adapter, self.state.backend, self.state.reason = adapter, backend, reason


OUTCOMES = {role: Outcome(state) for role, state in STATES.items()}
OUTCOME = OUTCOMES[DRAFT_EXTEND]


def report_not_expected(roles: Iterable[str], reason: str) -> None:
    """No fill of these roles is expected: somebody left them out, or this rank has nothing to fill."""
    left = list(roles)
    for role in left:
        STATES[role].is_expected = False
    report_idle(left, reason)


def report_idle(roles: Iterable[str], reason: str) -> None:
    """SGLang fills the metadata of these roles for the same reason, which is logged in one line."""
    told = [role for role in roles if OUTCOMES[role]._become_idle(reason)]
    if told:
        _log_idle(reason, ", ".join(told))


def _log_idle(reason: str, roles: str) -> None:
    logger.info(
        "sglang-nsa-plugin %s: not used: %s; SGLang fills %s metadata itself", VERSION, reason, roles
    )
