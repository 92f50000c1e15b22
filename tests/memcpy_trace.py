"""Prints which function asked for each copy: compute-sanitizer's initcheck reports only an address."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators that may call cudaMemcpy → the index of the argument that they read.
COPIES = {aten.copy_: 1, aten._to_copy: 0, aten.clone: 0, aten._local_scalar_dense: 0}


class MemcpyTrace(TorchDispatchMode):
    """Prints, before each copy from a device, the line that integration/gpu/sanitizers.py looks for.

    For example ``copy of 0x7eff13a00200, 1064 bytes, for MODULE.FUNCTION``.

    A copy that stays on the GPU is made by a kernel instead and not printed, unless SGLang asks for it.
    initcheck sees a kernel's reads when they happen, but checks the source of a cudaMemcpy node while
    the graph is recorded, before anything has written it. A copy that converts the type is always made
    by a kernel; if it were printed, a later copy from the same address would be attributed to it.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        which = COPIES.get(operator.overloadpacket)
        source = None if which is None else args[which]
        if source is None or source.device.type != self.device_type or not source.numel():
            return operator(*args, **kwargs)
        device, dtype = _target_type(operator, args, kwargs)
        if device == source.device and dtype != source.dtype:
            return operator(*args, **kwargs)
        asker = _asker()
        is_device_copy = operator is aten.copy_.default and device == source.device
        if is_device_copy and not source.is_floating_point() and not asker.startswith("sglang."):
            return copied_by_kernel(*args[:2])  # lengths, slots and pages: integers
        print(_line(source, asker), flush=True)
        return operator(*args, **kwargs)


def copied_by_kernel(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``target.copy_(source)`` without cudaMemcpy."""
    source = source.expand_as(target)
    return torch.maximum(source, source, out=target)


def _target_type(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device, torch.dtype]:
    if operator is aten.copy_.default:
        return args[0].device, args[0].dtype
    return torch.device(kwargs.get("device") or args[0].device), kwargs.get("dtype") or args[0].dtype


def _line(source: torch.Tensor, asker: str) -> str:
    steps = zip(source.shape, source.stride(), strict=True)
    cells = 1 + sum((size - 1) * stride for size, stride in steps)
    return f"copy of {source.data_ptr():#x}, {cells * source.element_size()} bytes, for {asker}"


def _asker() -> str:
    """The innermost function outside torch and this file."""
    frame = sys._getframe()
    while frame.f_back is not None and _module(frame).partition(".")[0] in ("torch", __name__):
        frame = frame.f_back
    return f"{_module(frame)}.{frame.f_code.co_name}"


def _module(frame: Any) -> str:
    return str(frame.f_globals.get("__name__"))
