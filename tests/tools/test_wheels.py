"""What a release's wheels must be, and where they are tried. The wheels here hold a made-up library."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from integration.wheels import check, packages, roots
from sglang_nsa_plugin.kernels import gpu_code

ROOT = Path(__file__).resolve().parent.parent.parent
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


# Where they are tried


@pytest.fixture
def debootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that downloads the same package, named for the processor, into whatever folder it is given."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb, which unpacks Debian's packages")
    tree = tmp_path / "libc6"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: libc6\nVersion: 2.31\nArchitecture: arm64\nMaintainer: a <a@b>\nDescription: a\n"
    )
    (tree / "file").write_text("of libc6\n")
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "libc6_2.31_arm64.deb"], check=True)
    script = tmp_path / "bin" / "debootstrap"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh
echo "$@" > {tmp_path}/asked
for folder; do :; done
mkdir -p "$folder/var/cache/apt/archives"
cp {tmp_path}/*.deb "$folder/var/cache/apt/archives"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("debootstrap")
@pytest.mark.parametrize("only", [("*",), ("libc6",)])
def test_debian_packages_are_unpacked(tmp_path: Path, only: tuple[str, ...]) -> None:
    packages.debian("aarch64", "bullseye", "libc6-dev", tmp_path / "root", only)
    assert (tmp_path / "root" / "file").read_text() == "of libc6\n"
    asked = (tmp_path / "asked").read_text()
    assert "--download-only --arch=arm64 " in asked
    assert "--include=libc6-dev bullseye " in asked


@pytest.mark.usefixtures("debootstrap")
def test_a_debian_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Debian bullseye has no package libc6-dev for aarch64"):
        packages.debian("aarch64", "bullseye", "", tmp_path / "root", only=("libc6-dev",))


def test_without_the_wheel_no_root_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "DIST", tmp_path)
    with pytest.raises(SystemExit, match="dist/ must hold one x86_64 wheel, got 0: make wheel-x86_64"):
        roots.wheel()


def test_a_release_is_tried_before_its_checksums_are_printed() -> None:
    """What `make release` would run; lint and tests come first."""
    dry = subprocess.run(
        ["make", "--dry-run", "release"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    steps = (
        "bin/ruff check",
        "--ignore=tests/tools",
        " tests/tools\n",
        "rm -rf dist",
        "wheels.build x86_64",
        "wheels.build aarch64",
        "build --sdist",
        "twine check --strict",
        "wheels.emulated",
        "wheels.roots",
        "wheels.check dist",
    )
    places = [dry.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)


def test_the_releases_that_were_tried_are_in_the_document() -> None:
    """Each root of `make test-wheel-roots`, with its C library and the result."""
    document = (ROOT / "docs" / "releasing.md").read_text()
    tried = re.findall(r"^\| Debian \d+ \((\w+)\) \| 2\.\d+ \| x86_64 \| passed", document, re.M)
    assert tuple(tried) == roots.SUITES
