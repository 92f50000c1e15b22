"""An empty kernel right before a replay of the target's graph, while the GPU is behind the host.

Beside other processes on the GPU the graph's nodes follow one another more closely then, see
``docs/kernel.md``. Its launch takes the host some 16 µs. Where the GPU bounds the step the host has them
to spare: it comes to verify while the GPU is still in the step before. Where the host bounds the step
they would show, and the gaps do not matter: no kernel is launched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_nsa_plugin.containment import attempt

# How far the GPU is takes some 6 µs to ask. While it keeps up, one replay in so many asks.
ASK_EVERY = 16


class LastStep:
    """The end of the last speculative step that the plugin knows of.

    Attributes:
        done: an event close to it, recorded in the graph that ends a step. None before the first step,
            and where the plugin does not fill that graph; then the GPU counts as behind.
    """

    def __init__(self) -> None:
        self.done: torch.cuda.Event | None = None


LAST_STEP = LastStep()


class NoOp:
    """The empty kernel of one backend.

    Attributes:
        is_behind: whether the GPU was behind the host when it was last asked; True at first.
    """

    def __init__(self, launch: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        self.is_behind = True
        self._launch, self._on_error = launch, on_error

    def launch_if_behind(self) -> None:
        """To be called right before a replay: before each while ``is_behind``, else every ASK_EVERY."""
        attempt(self._launch_if_behind, self._on_error)

    def _launch_if_behind(self) -> None:
        done = LAST_STEP.done
        self.is_behind = done is None or not done.query()
        if self.is_behind:
            self._launch()
