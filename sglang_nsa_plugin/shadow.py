"""Compares the plugin's metadata with SGLang's own on the device, and reports to the host later.

Nothing here waits: a comparison is two launches and a copy to pinned memory, and the host reads the copy
once it has arrived. After a difference, further comparisons do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from sglang_nsa_plugin.kernels import cpu, cuda, library


def why_unavailable(device: torch.device) -> str | None:
    """Why tensors of this device cannot be compared here, or None."""
    return cuda.why_unavailable() if device.type == "cuda" else cpu.why_unavailable()


class Field(IntEnum):
    """Indices into a report, in the order of ``csrc/compare.h``."""

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
    """The same tensor from two fills.

    Attributes:
        name: how the tensor is reported.
        ours, theirs: int32, the same shape of one or two dimensions.
        page_size: None when every cell is live. Otherwise the number of tokens that a column stands for:
            then each request has the same number of rows, and a cell is live when the first token of its
            column lies below the length of its request.
    """

    name: str
    ours: torch.Tensor
    theirs: torch.Tensor
    page_size: int | None = None


@dataclass(frozen=True)
class Difference:
    """The first cell that was not equal, in the order of the pairs, and how many were not."""

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
    """What the comparisons found: on the device, and the last copy of it on the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.zeros(len(Field), dtype=torch.int64, device=device)
        self.on_device[Field.FIRST] = torch.iinfo(torch.int64).max
        on_cuda = device.type == "cuda"
        self._copy = torch.zeros(len(Field), dtype=torch.int64, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None
        self._fetching = False
        self._is_outdated = False  # comparisons ran since the current copy was started
        self.values = self._copy.tolist()

    def fetch(self) -> None:
        """Starts to copy the report to the host, after the work on the current stream."""
        self._is_outdated = self._fetching
        if self._fetching:
            return
        self._copy.copy_(self.on_device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._fetching = True

    def arrived(self) -> bool:
        """Whether a copy has arrived since the last call; :attr:`values` is that copy then."""
        if not self._fetching or (self._copied is not None and not self._copied.query()):
            return False
        self._fetching = False
        self.values = self._copy.tolist()
        if self._is_outdated:
            self.fetch()
        return True


class Comparison:
    """The comparison of the pairs of one batch size, bound once and run many times.

    Args:
        pairs: at most 20.
        lengths: int32 [requests], tokens of each request in SGLang's own fill, for page tables.
        report: where the result goes.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: shapes do not match, or tensors are on different devices.
    """

    def __init__(self, pairs: Sequence[Pair], lengths: torch.Tensor, report: Report) -> None:
        for pair in pairs:
            _validate(pair, lengths, report)
        self.names = tuple(pair.name for pair in pairs)
        self.report = report
        self._tensors = (lengths, pairs)  # kept alive: the bound comparison holds addresses only
        self._device = lengths.device
        self._launch = library.load()["bind_comparison"](
            report.on_device,
            lengths,
            [_matrix(pair.ours) for pair in pairs],
            [_matrix(pair.theirs) for pair in pairs],
            [pair.page_size or 0 for pair in pairs],
        )

    def run(self) -> None:
        """Compares on the current stream and starts to fetch the report."""
        stream = 0
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        self._launch(stream)
        self.report.fetch()

    def difference(self) -> Difference | None:
        """The difference in the report's last copy, or None."""
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


def _validate(pair: Pair, lengths: torch.Tensor, report: Report) -> None:
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
