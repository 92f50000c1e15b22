"""Compares our metadata with SGLang's own on the device, and tells the host later.

Nothing here waits: a comparison is two launches and a copy to pinned memory, and the host looks at the
copy when it has arrived. A comparison that found a difference is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from sglang_nsa_plugin.kernels import cpu, cuda, library


def unavailable(device: torch.device) -> str | None:
    """Why tensors of this device cannot be compared here, or None."""
    return cuda.why_unavailable() if device.type == "cuda" else cpu.why_unavailable()


class Field(IntEnum):
    """Places in a report, as ``csrc/compare.h`` has them."""

    CHECKS = 0
    VALUES = 1
    DIFFERENT = 2
    PAIR = 3
    ROW = 4
    COLUMN = 5
    OURS = 6
    THEIRS = 7
    REQUESTS = 8
    LENGTH = 9
    FOUND = 10
    FIRST = 11


@dataclass(frozen=True)
class Pair:
    """One tensor of two fills.

    Attributes:
        name: of the tensor.
        ours, theirs: int32, the same shape of one or two dimensions.
        page_size: None when every cell counts; else the tokens a column stands for: then rows belong
            to requests, the same number to each, and a column counts when its first token lies below
            the request's length.
    """

    name: str
    ours: torch.Tensor
    theirs: torch.Tensor
    page_size: int | None = None


@dataclass(frozen=True)
class Difference:
    """The first cell, in the order of the pairs, that was not equal."""

    count: int
    tensor: str
    row: int
    column: int
    ours: int
    theirs: int
    batch_size: int
    length: int | None

    def __str__(self) -> str:
        request = "" if self.length is None else f", whose request has {self.length} tokens"
        return (
            f"{self.tensor}[{self.row}, {self.column}]{request}, in a batch of {self.batch_size}: ours "
            f"{self.ours}, SGLang's {self.theirs}; {self.count} values differ in all"
        )


class Report:
    """What the comparisons of one process found: on the device, and its last copy on the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.zeros(len(Field), dtype=torch.int64, device=device)
        self.on_device[Field.FIRST] = torch.iinfo(torch.int64).max
        on_cuda = device.type == "cuda"
        self._copy = torch.zeros(len(Field), dtype=torch.int64, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None
        self._fetching = False
        self._is_older = False  # comparisons ran since the copy under way was started
        self.values = self._copy.tolist()

    def fetch(self) -> None:
        """Starts to copy the report to the host, behind what the current stream has to do."""
        self._is_older = self._fetching
        if self._fetching:
            return
        self._copy.copy_(self.on_device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._fetching = True

    def arrived(self) -> bool:
        """Whether a copy has come since the last call; :attr:`values` is that copy then."""
        if not self._fetching or (self._copied is not None and not self._copied.query()):
            return False
        self._fetching = False
        self.values = self._copy.tolist()
        if self._is_older:
            self.fetch()
        return True


class Comparison:
    """The pairs of one batch size, bound once.

    Args:
        pairs: at most 12.
        lengths: int32 [requests], for the pairs with a page size. SGLang's own ones.
        report: where the result goes.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: shapes or devices that do not go together.
    """

    def __init__(self, pairs: Sequence[Pair], lengths: torch.Tensor, report: Report) -> None:
        for pair in pairs:
            _check(pair, lengths, report)
        self.names = tuple(pair.name for pair in pairs)
        self.report = report
        self._tensors = (lengths, pairs)  # the bound comparison holds addresses only
        self._device = lengths.device
        self._launch = library.load()["bind_comparison"](
            report.on_device,
            lengths,
            [_matrix(pair.ours) for pair in pairs],
            [_matrix(pair.theirs) for pair in pairs],
            [pair.page_size or 0 for pair in pairs],
        )

    def run(self) -> None:
        """Compares on the current stream and fetches the report."""
        stream = 0
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        self._launch(stream)
        self.report.fetch()

    def difference(self) -> Difference | None:
        """What the report's last copy says."""
        found = self.report.values
        if not found[Field.DIFFERENT]:
            return None
        length = found[Field.LENGTH]
        return Difference(
            count=found[Field.DIFFERENT],
            tensor=self.names[found[Field.PAIR]],
            row=found[Field.ROW],
            column=found[Field.COLUMN],
            ours=found[Field.OURS],
            theirs=found[Field.THEIRS],
            batch_size=found[Field.REQUESTS],
            length=length if length >= 0 else None,
        )


def _check(pair: Pair, lengths: torch.Tensor, report: Report) -> None:
    for tensor in (pair.ours, pair.theirs, lengths):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{pair.name}: must be compared as int32, got {tensor.dtype}")
        if tensor.device != report.on_device.device:
            raise ValueError(
                f"{pair.name}: must be on {report.on_device.device} like the report, got {tensor.device}"
            )
    if pair.ours.shape != pair.theirs.shape or pair.ours.dim() not in (1, 2):
        raise ValueError(
            f"{pair.name}: must have one shape of 1 or 2 dimensions, got {tuple(pair.ours.shape)} and "
            f"{tuple(pair.theirs.shape)}"
        )
    if pair.page_size is not None and pair.ours.shape[0] % max(lengths.shape[0], 1):
        raise ValueError(
            f"{pair.name}: every request must have the same number of rows, got {pair.ours.shape[0]} "
            f"rows for {lengths.shape[0]} requests"
        )


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(0)
