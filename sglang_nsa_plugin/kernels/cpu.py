"""The CPU twin of the CUDA kernels (``csrc/fill_cpu.cc``): the same arithmetic, one thread."""

from __future__ import annotations

from collections.abc import Callable

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import compiled, library


def why_unavailable() -> str | None:
    """Why this implementation cannot run here, or None."""
    try:
        library.load()
    except library.LibraryUnavailableError as error:
        return str(error)
    return None


def bind(args: FillArgs) -> Callable[[], None]:
    """Returns a function that fills the outputs of ``args``."""
    launch = compiled.binder()(args)

    def run(args: FillArgs = args) -> None:  # keeps the tensors alive: launch holds addresses only
        launch(0)

    return run
