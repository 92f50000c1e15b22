"""Packages of Debian and of the package index, for one processor or the other, unpacked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DIST = ROOT / "dist"
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}
AARCH64 = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def run(*command: object, **variables: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def which(tool: str) -> str:
    """The path of a tool, which must be there."""
    found = shutil.which(tool)
    if found is None:
        raise SystemExit(f"{tool} is missing: docs/releasing.md says what to install")
    return os.path.realpath(found)


def debian(processor: str, suite: str, include: str, root: Path, only: tuple[str, ...] = ("*",)) -> None:
    """Unpacks a release's smallest set of packages and more, or ``only`` some of them; sets up none."""
    which("debootstrap")
    download = root.with_name(f"{root.name}-packages")
    options = (f"--arch={DEBIAN[processor]}", "--variant=minbase", f"--include={include}")
    run("debootstrap", "--download-only", *options, suite, download)
    for name in only:
        packages = list((download / "var/cache/apt/archives").glob(f"{name}_*.deb"))
        if not packages:
            raise SystemExit(f"Debian {suite} has no package {name} for {processor}")
        for package in packages:
            run("dpkg-deb", "-x", package, root)


def for_aarch64(command: str, *arguments: object) -> None:
    """pip, for an aarch64 Python 3.11. Requirements are named: pip would take this processor's."""
    platforms = [word for name in AARCH64 for word in ("--platform", f"{name}_aarch64")]
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms)
    run("python", "-m", "pip", command, *options, *arguments)
