"""The compiled k-pooling fill: the CUDA kernel (``csrc/kpool.cu``), and on the CPU its twin."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_nsa_plugin.kernels import compiled
from sglang_nsa_plugin.kpool_args import KPoolArgs


def bind(args: KPoolArgs) -> Callable[[], None]:
    """Returns a function that fills, on the stream that is current when it is called.

    Raises:
        LibraryUnavailableError: as ``library.load``.
    """
    launch = compiled.kpool_binder()(args)
    if args.device.type == "cpu":
        stream_of: Callable[[int], int] = lambda device: 0  # noqa: E731
    else:
        stream_of = torch._C._cuda_getCurrentRawStream
    device = args.device.index

    def run(args: KPoolArgs = args) -> None:  # keeps the tensors alive: launch holds addresses only
        launch(stream_of(device))

    return run
