"""An empty kernel right before replays of the target's graph, while the GPU is the bottleneck.

Beside other processes on the GPU the graph's nodes follow one another more closely then, see
``docs/kernel.md``. The launch takes about 16 µs of host time. If the GPU is the bottleneck, that costs
nothing: when the host reaches verify, the GPU is still busy with the step before. If the host is the
bottleneck, the launch would lengthen the step, and shorter gaps would not help.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_nsa_plugin.containment import attempt

# Querying an event takes about 6 µs. After SURE_AFTER queries in a row that found it done, only one
# replay in QUERY_EVERY makes one. A single one says little: after a prefill, the event is an older
# step's.
SURE_AFTER, QUERY_EVERY = 4, 16


class LastDraftExtend:
    """The last replay of a draft-extend graph, with which a speculative step ends.

    Attributes:
        fill_done: the event behind its fill. None before the first one, and where the plugin does not
            fill that graph; then the GPU counts as busy.
    """

    def __init__(self) -> None:
        self.fill_done: torch.cuda.Event | None = None


LAST_DRAFT_EXTEND = LastDraftExtend()


class NoOp:
    """The empty kernel of one backend.

    Attributes:
        replays_left: replays that come before the next query; the caller counts them down.
    """

    __slots__ = ("_kept_up", "_launch", "_on_error", "replays_left")

    def __init__(self, launch: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        self.replays_left = 0
        self._kept_up = 0  # queries in a row that found the GPU past the step before
        self._launch, self._on_error = launch, on_error

    def before_replay(self) -> None:
        """To be called right before each replay of the target's graph; the fast path has it inline."""
        self.replays_left -= 1
        if self.replays_left < 0:
            self.launch_if_busy()

    def launch_if_busy(self) -> None:
        """Launches the kernel if the GPU is still in the step before."""
        attempt(self._launch_if_busy, self._on_error)

    def _launch_if_busy(self) -> None:
        fill_done = LAST_DRAFT_EXTEND.fill_done
        if fill_done is None or not fill_done.query():
            self._kept_up = self.replays_left = 0
            self._launch()
        else:
            self._kept_up += 1
            self.replays_left = QUERY_EVERY - 1 if self._kept_up >= SURE_AFTER else 0
