"""``make test-wheel-roots``: the x86_64 wheel of dist/ in fresh Debian roots, without a network.

    python -m integration.wheels.roots [--mirror URL] [SUITE ...]

Each root is the smallest that debootstrap makes. In it, pip installs the wheel and what it requires from
a folder into an empty environment, and `sglang-nsa-plugin verify` must succeed. Its Python 3.11 was
built in the first suite from Debian's sources: a release with such an old C library has none that SGLang
supports. torch and SGLang are lent, read-only, by the Python that runs this.

Needs root on an x86_64 Debian or Ubuntu with debootstrap, and 1 GB below build/roots. The first run is
about ten minutes longer than later ones, which keep the Python.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from integration.wheels.packages import DIST, ROOT, run, which

FOLDER = ROOT / "build" / "roots"
SUITES = ("bullseye", "trixie")  # glibc 2.31, the oldest that Debian's mirrors have, and 2.41
MIRROR = "http://deb.debian.org/debian"
SOURCE = ("bookworm", "python3.11")
TO_BUILD = (
    *("gcc", "make", "libc6-dev", "zlib1g-dev", "libffi-dev", "libssl-dev"),
    *("libsqlite3-dev", "libbz2-dev", "liblzma-dev", "xz-utils"),
)
PYTHON = "/opt/python/bin/python3.11"
# Beside the C library, what Python is linked to differs between releases: it goes with Python.
BUILD = f"""
set -e
cd /opt
apt-get update -qq
apt-get source -qq --download-only {SOURCE[1]}
tar xf {SOURCE[1]}_*.orig.tar.*
cd Python-*
./configure -q --prefix=/opt/python --disable-test-modules LDFLAGS=-Wl,-rpath,/opt/python/lib
make -s -j"$(nproc)" > log 2>&1 && make -s install >> log 2>&1 || {{ tail log; exit 1; }}
ldd /opt/python/lib/python3.11/lib-dynload/*.so | awk '$2 == "=>" {{print $3}}' | sort -u |
    grep -Ev '/lib(c|m|dl|pthread|resolv|rt|util)[.]so' | xargs -I LIBRARY cp -L LIBRARY /opt/python/lib
"""
CHECK = f"""
set -e
{PYTHON} -m venv /opt/new
/opt/new/bin/python -m pip install --quiet --no-index --find-links /opt/wheels sglang-nsa-plugin
cp /opt/lent.pth /opt/new/lib/python3.11/site-packages
cd /tmp
/opt/new/bin/python -c 'import sglang_nsa_plugin; print(sglang_nsa_plugin.__path__[0])' | grep ^/opt/new/
/opt/new/bin/sglang-nsa-plugin verify
/opt/new/bin/python -c 'import platform; print("installed offline, verified:", *platform.libc_ver())'
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", nargs="*", default=SUITES, help=f"default: {' '.join(SUITES)}")
    parser.add_argument("--mirror", default=MIRROR, help="Debian's archive has older suites")
    arguments = parser.parse_args()
    if platform.python_version_tuple()[:2] != ("3", "11"):
        parser.error(f"the Python that lends torch and SGLang must be 3.11, got {sys.version}")
    python = built_python(arguments.suite[0], arguments.mirror)
    wheels = downloaded(wheel())
    failed = [s for s in arguments.suite if not check(made_root(s, arguments.mirror), python, wheels)]
    print(f"failed: {' '.join(failed)}" if failed else f"passed: {' '.join(arguments.suite)}")
    return 1 if failed else 0


def wheel() -> Path:
    found = list(DIST.glob("*_x86_64.whl"))
    if len(found) != 1:
        raise SystemExit(f"dist/ must hold one x86_64 wheel, got {len(found)}: make wheel-x86_64")
    return found[0]


def downloaded(wheel: Path) -> Path:
    """A folder with the wheel and the wheels of all that it requires."""
    folder = FOLDER / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    options = ("--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--dest", folder)
    run(sys.executable, "-m", "pip", "download", *options, wheel)
    return folder


def made_root(suite: str, mirror: str, *include: str) -> Path:
    root = FOLDER / "-".join((suite, *(["builder"] if include else [])))
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    more = [f"--include={','.join(include)}"] if include else []
    print(f"debootstrap {suite} into {root}", flush=True)
    run(which("debootstrap"), "--variant=minbase", *more, suite, root, mirror)
    return root


def built_python(suite: str, mirror: str) -> Path:
    """A Python built in a root of its own; kept for later runs."""
    kept = FOLDER / f"python-{suite}"
    if kept.is_dir():
        return kept
    root = made_root(suite, mirror, *TO_BUILD)
    sources = root / "etc/apt/sources.list.d/sources.list"
    sources.write_text(f"deb-src {MIRROR} {SOURCE[0]} main\n")
    shutil.copy("/etc/resolv.conf", root / "etc")
    print("building Python", flush=True)
    run("chroot", root, "sh", "-c", BUILD)
    (root / "opt/python").rename(kept)
    shutil.rmtree(root)
    return kept


def check(root: Path, python: Path, wheels: Path) -> bool:
    """Whether the wheel installs and `verify` succeeds in a root that has no network."""
    lent = {f"/opt/lent/{n}": path for n, path in enumerate(lenders())}
    (root / "opt/lent.pth").write_text("".join(f"{inside}\n" for inside in lent))
    bound = {"/opt/python": python, "/opt/wheels": wheels, **lent}
    commands = ["set -e", f"mount -t proc proc {shlex.quote(str(root / 'proc'))}"]
    for inside, path in bound.items():
        target = root / inside.lstrip("/")
        target.mkdir(parents=True)
        pair = shlex.join((str(path), str(target)))
        commands += [f"mount --bind {pair}", f"mount -o remount,bind,ro {shlex.quote(str(target))}"]
    # The mounts are in a namespace of their own and go with it, whatever happens.
    inside = shlex.join(("env", "-i", "PATH=/usr/bin:/bin", "HOME=/tmp", "sh", "-c", CHECK))
    commands.append(f"exec chroot {shlex.quote(str(root))} {inside}")
    new = ("unshare", "--mount", "--net", "--pid", "--fork")
    return subprocess.run([*new, "sh", "-c", "\n".join(commands)], check=False).returncode == 0


def lenders() -> list[Path]:
    """The folders of this Python's packages."""
    return [Path(path) for path in sys.path if path.endswith("-packages")]


if __name__ == "__main__":
    sys.exit(main())
