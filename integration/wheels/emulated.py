"""``make test-aarch64``: the value tests with the aarch64 wheel of dist/, under emulation.

Needs Debian or Ubuntu with qemu-user-static and debootstrap (which wants root). Downloads an aarch64
Python 3.11 and, from the package index, torch into build/emulated: 300 MB. Takes five minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from integration.wheels.packages import DIST, ROOT, debian, for_aarch64, which

FOLDER = ROOT / "build" / "emulated"
PYTHON = "python3,libstdc++6,libgomp1,libgcc-s1"
# With what they require.
PACKAGES = (
    *("torch==2.9.1", "numpy==2.3.5", "apache-tvm-ffi==0.1.5", "typing_extensions", "sympy", "mpmath"),
    *("filelock", "jinja2", "MarkupSafe", "networkx", "fsspec", "rich", "pygments", "markdown-it-py"),
    *("mdurl", "pytest", "pytest-timeout", "iniconfig", "packaging", "pluggy", "hypothesis"),
    *("sortedcontainers", "attrs"),
)
TESTS = ("test_values.py", "test_fill_args.py")


def main() -> int:
    emulator = which("qemu-aarch64-static")
    root, packages, installed, tests = (FOLDER / n for n in ("root", "packages", "installed", "tests"))
    if not packages.is_dir():
        shutil.rmtree(FOLDER, ignore_errors=True)
        make_root(root)
        for_aarch64("install", "--target", packages, *PACKAGES)
    shutil.rmtree(installed, ignore_errors=True)
    local = ("--no-index", "--find-links", DIST)
    for_aarch64("install", *local, "--target", installed, "sglang-nsa-plugin")
    # Beside no source tree, whose Python would come first.
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests)
    shutil.copy(ROOT / "pyproject.toml", FOLDER)
    python = tuple(map(str, (emulator, "-L", root, root / "usr/bin/python3.11", "-m")))
    paths = os.pathsep.join(map(str, (packages, installed)))
    variables = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables}
    verify(python, environment)
    command = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton", *TESTS)
    return subprocess.run(command, cwd=tests, env=environment, check=False).returncode


def verify(python: tuple[str, ...], environment: dict[str, str]) -> None:
    """Runs ``verify``, which fills with the wheel's library. It finds no SGLang, so its code is 1."""
    command = (*python, "sglang_nsa_plugin", "verify", "--json")
    done = subprocess.run(command, env=environment, cwd=FOLDER, stdout=subprocess.PIPE, check=False)
    result = json.loads(done.stdout)
    reason = result["implementations"]["cpu"]["reason"]
    print(
        f"verify on aarch64: compiled for {', '.join(result['gpu_code'])}; CPU fill:", reason or "equal"
    )
    if reason is not None:
        raise SystemExit(f"the library of the aarch64 wheel does not fill: {reason}")


def make_root(root: Path) -> None:
    """An aarch64 Python and its C library, unpacked and not set up."""
    debian("aarch64", "bookworm", PYTHON, root)
    # The emulator looks below its root first, and pytest would find this folder empty there.
    (root / "tmp").rmdir()


if __name__ == "__main__":
    sys.exit(main())
