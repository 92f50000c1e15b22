"""What a release's wheels must be: for both processors, small, and with the same GPU code.

    python -m integration.wheels.check DIST

Prints each file with its size, what it holds and its SHA-256; ends with code 1 where a rule is broken.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from sglang_nsa_plugin.kernels import gpu_code

PROCESSORS = ("aarch64", "x86_64")
NEWEST_GLIBC = 28  # 2.28: RHEL 8 and everything later
MOST_BYTES = 5 * 2**20
LIBRARY = "sglang_nsa_plugin/lib/nsa_metadata.so"
MODULES = re.compile(r"sglang_nsa_plugin/(\w+/)*\w+\.py")
METADATA = re.compile(r"[\w.-]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)")


class Wheel(NamedTuple):
    """A wheel's file name and size, the names of its files, and its compiled library."""

    name: str
    size: int
    files: tuple[str, ...]
    library: bytes


def read(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        files = tuple(name for name in archive.namelist() if not name.endswith("/"))
        return Wheel(path.name, path.stat().st_size, files, archive.read(LIBRARY))


def broken_rules(wheels: list[Wheel]) -> list[str]:
    """What is wrong with the wheels of one release, in words."""
    found = [rule for wheel in wheels for rule in _broken_alone(wheel)]
    processors = sorted(_tag(wheel)[1] for wheel in wheels)
    if processors != list(PROCESSORS):
        found.append(f"one wheel for each of {', '.join(PROCESSORS)} is expected, got {processors}")
    elif gpu_code.images(wheels[0].library) != gpu_code.images(wheels[1].library):
        found.append("the wheels of both processors hold different GPU code")
    return found


def _broken_alone(wheel: Wheel) -> list[str]:
    found = []
    glibc, processor = _tag(wheel)
    if glibc is None or glibc > NEWEST_GLIBC:
        found.append(f"{wheel.name}: the tag must be manylinux_2_{NEWEST_GLIBC}_{processor} or older")
    if wheel.size >= MOST_BYTES:
        found.append(f"{wheel.name}: {wheel.size:,} bytes, {MOST_BYTES:,} are too many")
    if not gpu_code.images(wheel.library):
        found.append(f"{wheel.name}: the library was built without CUDA")
    known = (MODULES, METADATA, re.compile(re.escape(LIBRARY)))
    strange = [name for name in wheel.files if not any(kind.fullmatch(name) for kind in known)]
    if strange:
        found.append(f"{wheel.name}: does not belong into a wheel: {', '.join(strange)}")
    return found


def _tag(wheel: Wheel) -> tuple[int | None, str]:
    """The second number of the glibc that the wheel's tag asks for, None without one; the processor."""
    tag = re.search(r"-(?:manylinux_2_(\d+)|[a-z]+)_(\w+)\.whl$", wheel.name)
    if tag is None:
        return None, "unknown"
    return int(tag[1]) if tag[1] else None, tag[2]


def main() -> int:
    folder = Path(sys.argv[1])
    paths = sorted(folder.glob("*.whl"))
    wheels = [read(path) for path in paths]
    for wheel in wheels:
        print(f"{wheel.name}: {wheel.size:,} bytes, {len(wheel.files)} files, GPU code for", end=" ")
        print(", ".join(gpu_code.targets(wheel.library)) or "nothing")
    for path in [*paths, *sorted(folder.glob("*.tar.gz"))]:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    found = broken_rules(wheels)
    print("\n".join(found) or "equal GPU code, true tags", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
