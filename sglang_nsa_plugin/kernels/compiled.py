"""Packs the arguments of a fill for the compiled library; ``cuda.py`` and ``cpu.py`` launch it.

The library knows the SHA-256 of this file and is refused beside another one: both sides of a call are
built together.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import library
from sglang_nsa_plugin.kpool_args import KPoolArgs


class Binder:
    """Binds fills with one build of the library, a TVM FFI module."""

    def __init__(self, module: Any) -> None:
        self._bind = module["bind"]
        # The library names its parameters; fields of FillArgs have the same names.
        self._values = operator.attrgetter(*module["parameters"]())

    def __call__(self, args: FillArgs, max_blocks: int = 0) -> Callable[[int], None]:
        """Packs ``args`` and returns a function of the address of the stream to launch on.

        ``max_blocks`` limits the CUDA grid of a ragged fill; 0 leaves it to the shapes and the GPU. The
        caller keeps the tensors of ``args`` alive.
        """
        launch: Callable[[int], None] = self._bind(max_blocks, *self._values(args))
        return launch


class KPoolBinder:
    """The same of k-pooling fills."""

    def __init__(self, module: Any) -> None:
        self._bind = module["bind_kpool"]
        self._values = operator.attrgetter(*module["kpool_parameters"]())

    def __call__(self, args: KPoolArgs) -> Callable[[int], None]:
        """Packs ``args`` and returns a function of the address of the stream to launch on."""
        launch: Callable[[int], None] = self._bind(*self._values(args))
        return launch


@functools.cache
def kpool_binder() -> KPoolBinder:
    """The binder of the installed library, as :func:`binder`."""
    return KPoolBinder(library.load())


@functools.cache
def binder() -> Binder:
    """The binder of the installed library.

    Raises:
        LibraryUnavailableError: as :func:`library.load`.
    """
    return Binder(library.load())
