"""What GPU code the compiled library holds: machine code for which GPUs, and PTX."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

SECTION = ".nv_fatbin"
# nvcc puts the images of one source file into a container, one behind the other.
CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of what follows
IMAGE = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of what follows; GPU
MAGIC = 0xBA55ED50
PREFIXES = {1: "compute_", 2: "sm_"}  # kind 1 is PTX, kind 2 machine code
ALIGNMENT = 8


class Image(NamedTuple):
    """The kernels of one source file for one GPU: ``sm_90`` is machine code, ``compute_90`` PTX."""

    target: str
    code: bytes


def images(library: bytes) -> list[Image]:
    """All images in an ELF file; none where it was built without CUDA.

    Raises:
        ValueError: the file is no ELF file, or its images have another format.
    """
    try:
        return list(_images(_section(library)))
    except struct.error as error:
        raise ValueError(f"the GPU code of the library is truncated: {error}") from error


def targets(library: bytes) -> list[str]:
    """What every source file was compiled for, machine code first: ``["sm_90", "compute_90"]``."""
    found = {image.target for image in images(library)}
    return sorted(found, key=lambda target: (target.startswith("compute_"), int(target.split("_")[1])))


def _section(elf: bytes) -> bytes:
    if not elf.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("the library is no 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, _, _, _, begin, length in headers:
        at = headers[names][4] + name
        if elf[at : elf.index(b"\0", at)] == SECTION.encode():
            return elf[begin : begin + length]
    return b""


def _images(section: bytes) -> Iterator[Image]:
    at = 0
    while at < len(section):
        if not any(section[at : at + ALIGNMENT]):  # between two containers
            at += ALIGNMENT
            continue
        magic, _, header, length = CONTAINER.unpack_from(section, at)
        if magic != MAGIC:
            raise ValueError(f"the GPU code of the library begins with {magic:#x}, not {MAGIC:#x}")
        at += header
        yield from _contained(section[at : at + length])
        at += length


def _contained(container: bytes) -> Iterator[Image]:
    at = 0
    while at < len(container):
        kind, _, header, length, gpu = IMAGE.unpack_from(container, at)
        if kind not in PREFIXES:
            raise ValueError(f"the library holds GPU code of kind {kind}; known are 1 (PTX) and 2")
        at += header
        yield Image(f"{PREFIXES[kind]}{gpu}", container[at : at + length])
        at += length
