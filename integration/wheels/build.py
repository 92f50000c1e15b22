"""``make wheel-x86_64`` and ``make wheel-aarch64``: a release's wheel, for the C library of Debian 11.

    python -m integration.wheels.build x86_64|aarch64

Needs an x86_64 Debian or Ubuntu with nvcc 13, debootstrap (which wants root) and, for aarch64,
g++-aarch64-linux-gnu. Downloads the C library's headers and stubs, and for aarch64 the CUDA runtime and
TVM FFI from the package index, into build/aarch64 or build/x86_64. Leaves the wheel in dist/, with the
lowest manylinux tag that its library fulfils.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from integration.wheels.packages import DEBIAN, DIST, ROOT, debian, for_aarch64, run, which

C_LIBRARY = ("libc6", "libc6-dev", "linux-libc-dev")
TVM_FFI = "apache-tvm-ffi==0.1.5"  # as in pyproject.toml's build-system
BUNDLED_ELSEWHERE = "libtvm_ffi.so"  # comes with apache-tvm-ffi
TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {processor})
set(CMAKE_CXX_COMPILER {triple}-g++)
set(CMAKE_CUDA_COMPILER {nvcc})
set(CMAKE_CUDA_HOST_COMPILER {triple}-g++)
set(CMAKE_CXX_FLAGS_INIT "{cxx_flags}")
set(CMAKE_CUDA_FLAGS_INIT "{cuda_flags}")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "{link_flags}")
set(NSA_TVM_FFI_LIBRARY "{tvm_ffi}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("processor", choices=DEBIAN)
    processor = parser.parse_args().processor
    folder = ROOT / "build" / processor
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    toolchain = write_toolchain(processor, folder)
    built = build(processor, toolchain, folder)
    for older in DIST.glob(f"sglang_nsa_plugin-*_{processor}.whl"):
        older.unlink()
    # Without --plat: for another processor auditwheel takes none.
    run("auditwheel", "repair", "--exclude", BUNDLED_ELSEWHERE, "--wheel-dir", DIST, built)


def write_toolchain(processor: str, folder: Path) -> Path:
    """A CMake toolchain file that compiles for a processor and for Debian 11's C library."""
    triple = f"{processor}-linux-gnu"
    sysroot = c_library(processor, folder / "sysroot")
    nvcc, tvm_ffi = toolkit() / "bin/nvcc", ""
    if processor == "aarch64":
        nvcc = cuda_for_aarch64(toolkit(), folder / "cuda")
        tvm_ffi = str(from_index(TVM_FFI, folder / "tvm_ffi") / "tvm_ffi/lib/libtvm_ffi.so")
    headers = compiler_headers(triple)
    headers += [sysroot / "usr/include" / triple, sysroot / "usr/include"]
    flags = [f"--sysroot={sysroot}", "-nostdinc"]
    flags += [word for path in headers for word in ("-isystem", str(path))]
    libraries = [f"-L{sysroot}/usr/lib/{triple}", f"-L{sysroot}/lib/{triple}"]
    file = folder / "toolchain.cmake"
    file.write_text(
        TOOLCHAIN.format(
            processor=processor,
            triple=triple,
            nvcc=nvcc,
            cxx_flags=" ".join(flags),
            cuda_flags=f"-Xcompiler={','.join(flags)}",
            link_flags=" ".join([f"--sysroot={sysroot}", *libraries]),
            tvm_ffi=tvm_ffi,
        )
    )
    return file


def c_library(processor: str, sysroot: Path) -> Path:
    """Headers and stubs of glibc 2.31: what is linked to it runs with every later one."""
    debian(processor, "bullseye", "libc6-dev", sysroot, only=C_LIBRARY)
    # A link that leads out of the sysroot would lead to nothing, and the linker to a static library.
    for link in filter(Path.is_symlink, sysroot.rglob("*")):
        target = os.readlink(link)
        if target.startswith("/"):
            link.unlink()
            link.symlink_to(os.path.relpath(f"{sysroot}{target}", link.parent))
    return sysroot


def compiler_headers(triple: str) -> list[Path]:
    """The folders of C++'s and the compiler's own headers, without those of its C library."""
    command = (f"{triple}-g++", "-E", "-x", "c++", "-v", "/dev/null")
    which(command[0])
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    listed = said.partition("#include <...> search starts here:")[2].partition("End of search list")[0]
    folders = map(os.path.realpath, listed.split())
    return [Path(folder) for folder in folders if re.search(r"/c\+\+/|/lib/gcc", folder)]


def toolkit() -> Path:
    """The CUDA toolkit of the nvcc on PATH, which may be a script that calls another one."""
    command = (which("nvcc"), "--dryrun", "-E", "-x", "cu", "/dev/null")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    here = re.search(r"_HERE_=(\S+)", said)
    if here is None:
        raise SystemExit(f"{command[0]} --dryrun does not say where its toolkit is")
    return Path(here[1]).parent


def cuda_for_aarch64(native: Path, cross: Path) -> Path:
    """nvcc of a toolkit that has the headers of the native one and the runtime library for aarch64."""
    said = re.search(r"release ((\d+)\.\d+)", run(native / "bin/nvcc", "--version"))
    if said is None:
        raise SystemExit(f"{native}/bin/nvcc --version names no release")
    runtime = from_index(f"nvidia-cuda-runtime=={said[1]}.*", cross.with_name("cuda-runtime"))
    target = cross / "targets" / "sbsa-linux"
    target.mkdir(parents=True)
    (target / "include").symlink_to(native / "include")
    (target / "lib").symlink_to(runtime / "nvidia" / f"cu{said[2]}" / "lib")
    (cross / "nvvm").symlink_to(native / "nvvm")
    (cross / "bin").mkdir()  # nvcc looks for its target beside this folder, so it is not a link
    for file in (native / "bin").iterdir():
        (cross / "bin" / file.name).symlink_to(file)
    return cross / "bin" / "nvcc"


def from_index(requirement: str, folder: Path) -> Path:
    """The files of a package's wheel for aarch64."""
    for_aarch64("download", "--dest", folder, requirement)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def build(processor: str, toolchain: Path, folder: Path) -> Path:
    """The wheel as the build leaves it, tagged linux_… for its processor."""
    variables = {"NSA_CUDA": "ON", "CMAKE_ARGS": f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"}
    out = folder / "built"
    run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT, **variables)
    (wheel,) = out.glob("*.whl")
    # The build names the processor that it runs on.
    run("wheel", "tags", "--platform-tag", f"linux_{processor}", "--remove", wheel)
    (tagged,) = out.glob(f"*_{processor}.whl")
    return tagged


if __name__ == "__main__":
    main()
