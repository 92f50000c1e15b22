"""An empty kernel right before a replay of the target's graph, while the GPU is behind the host.

Beside other processes on the GPU the graph's nodes follow one another more closely then, see
``docs/kernel.md``. Its launch takes the host some microseconds, which show in a step that the host bounds;
there the gaps do not matter. Where the host has work to wait for, the GPU has not reached the end of the
step before yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class LastStep:
    """The end of the last speculative step that the plugin knows of.

    Attributes:
        done: an event close to it, recorded in the graph that ends a step; None before the first one, and
            where the plugin does not fill that graph. Then the GPU counts as behind.
    """

    def __init__(self) -> None:
        self.done: torch.cuda.Event | None = None


LAST_STEP = LastStep()


def while_behind(launch: Callable[[], None], last: LastStep = LAST_STEP) -> Callable[[], None]:
    """Launches only where the GPU has not reached the end of the step before."""

    def launch_if_behind() -> None:
        done = last.done
        if done is None or not done.query():
            launch()

    return launch_if_behind
