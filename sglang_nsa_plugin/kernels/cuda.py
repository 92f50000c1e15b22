"""The compiled CUDA kernels (``csrc/fill_*.cu``): one launch on the caller's current stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_nsa_plugin.fill_args import FillArgs
from sglang_nsa_plugin.kernels import compiled, library


def why_unavailable() -> str | None:
    """Why this implementation cannot run here, or None. Creates no CUDA context."""
    try:
        if not library.has_cuda():
            return "the library was built without nvcc; build it with nvcc 13: NSA_CUDA=ON pip install ."
    except library.LibraryUnavailableError as error:
        return str(error)
    if torch.version.hip is not None:
        return "this torch is a ROCm build; the kernel needs an NVIDIA GPU"
    return None


def bind(args: FillArgs, max_blocks: int = 0) -> Callable[[], None]:
    """Returns a function that launches the fill on the stream that is current when it is called.

    ``max_blocks`` limits the grid of a ragged fill; 0 leaves it to the shapes and the GPU.
    """
    launch = compiled.binder()(args, max_blocks)
    # torch.cuda.current_stream() makes an object, which takes longer than the launch.
    stream_of, device = torch._C._cuda_getCurrentRawStream, args.device.index

    def run(args: FillArgs = args) -> None:  # keeps the tensors alive: launch holds addresses only
        launch(stream_of(device))

    return run


def bind_no_op(device: torch.device) -> Callable[[], None]:
    """Returns a function that launches an empty kernel on the stream that is current when it is called.

    The launch is programmatic: right before a deep graph it can bring the graph's nodes closer together,
    see ``docs/kernel.md``. It ends after what comes before it on the stream.
    """
    launch: Callable[[int], None] = library.load()["bind_no_op"](device.index)
    stream_of, index = torch._C._cuda_getCurrentRawStream, device.index
    return lambda: launch(stream_of(index))
