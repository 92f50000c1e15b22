"""What a release's wheels must be. The wheels of the tests hold a made-up library."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from integration.wheels import check
from sglang_nsa_plugin.kernels import gpu_code

PTX, MACHINE_CODE = 1, 2


def image(kind: int, gpu: int, code: bytes) -> bytes:
    return gpu_code.IMAGE.pack(kind, 0x101, gpu_code.IMAGE.size, len(code), gpu) + code


def library(*containers: bytes) -> bytes:
    """An ELF file with one section of GPU code behind its names of sections."""
    section = b""
    for images in containers:
        header = gpu_code.CONTAINER.pack(gpu_code.MAGIC, 1, gpu_code.CONTAINER.size, len(images))
        section += header + images + bytes(-len(header + images) % 8) + bytes(8)
    names = b"\0" + gpu_code.SECTION.encode() + b"\0"
    begin = 64 + len(names)
    headers = struct.pack("<IIQQQQ24x", 0, 3, 0, 0, 64, len(names))
    headers += struct.pack("<IIQQQQ24x", 1, 1, 0, 0, begin, len(section))
    start = struct.pack("<4sBB34xQ10xHHH", b"\x7fELF", 2, 1, begin + len(section), 64, 2, 0)
    return start + names + section + headers


FULL = library(
    image(PTX, 90, b"ptx of a")
    + image(MACHINE_CODE, 90, b"a for 90")
    + image(MACHINE_CODE, 103, b"a on 103"),
    image(MACHINE_CODE, 90, b"b for 90"),
)


def wheel(
    folder: Path, tag: str, content: bytes = FULL, also: str = "sglang_nsa_plugin/api.py"
) -> check.Wheel:
    path = folder / f"sglang_nsa_plugin-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(check.LIBRARY, content)
        archive.writestr(also, "")
    return check.read(path)


@pytest.fixture
def aarch64(tmp_path: Path) -> check.Wheel:
    return wheel(tmp_path, "manylinux_2_24_aarch64")


def test_images_and_targets_of_a_library() -> None:
    assert [image.target for image in gpu_code.images(FULL)] == [
        "compute_90",
        "sm_90",
        "sm_103",
        "sm_90",
    ]
    assert gpu_code.images(FULL)[-1].code == b"b for 90"
    assert gpu_code.targets(FULL) == ["sm_90", "sm_103", "compute_90"]


def test_wheels_that_are_right(tmp_path: Path, aarch64: check.Wheel) -> None:
    assert check.broken_rules([aarch64, wheel(tmp_path, "manylinux_2_28_x86_64")]) == []


def test_gpu_code_that_differs_in_one_byte(tmp_path: Path, aarch64: check.Wheel) -> None:
    other = wheel(tmp_path, "manylinux_2_24_x86_64", FULL.replace(b"b for 90", b"c for 90"))
    assert check.broken_rules([aarch64, other]) == [
        "the wheels of both processors hold different GPU code"
    ]


@pytest.mark.parametrize(
    ("tag", "content", "also", "expected"),
    [
        ("linux_x86_64", FULL, "a.py", "the tag must be manylinux_2_28_x86_64 or older"),
        ("manylinux_2_34_x86_64", FULL, "a.py", "the tag must be manylinux_2_28_x86_64 or older"),
        ("manylinux_2_24_x86_64", library(), "a.py", "the library was built without CUDA"),
        ("manylinux_2_24_x86_64", FULL + bytes(1) * 6_000_000, "a.py", "are too many"),
        (
            "manylinux_2_24_x86_64",
            FULL,
            "../sglang_nsa_plugin.libs/libtvm_ffi.so",
            "does not belong into",
        ),
    ],
)
def test_a_wheel_that_is_wrong(tmp_path, aarch64, tag, content, also, expected) -> None:
    wrong = wheel(tmp_path, tag, content, f"sglang_nsa_plugin/{also}")
    assert expected in "\n".join(check.broken_rules([aarch64, wrong]))


def test_a_processor_without_a_wheel(aarch64: check.Wheel) -> None:
    assert check.broken_rules([aarch64]) == [
        "one wheel for each of aarch64, x86_64 is expected, got ['aarch64']"
    ]


@pytest.mark.parametrize("content", [b"no ELF file", FULL.replace(b"\x50\xed\x55\xba", b"xxxx", 1)])
def test_a_library_of_another_format(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"no 64-bit little-endian ELF file|begins with 0x"):
        gpu_code.images(content)
