"""Finds and loads the compiled library of the installed distribution."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import struct
from pathlib import Path
from typing import Any

import torch

TVM_FFI = "apache-tvm-ffi>=0.1.5,!=0.1.8.post0,<0.2"
ELF_HEADER_BYTES = 64
ROOT = Path(__file__).resolve().parents[2]  # site-packages, or the repository
PACKER = Path(__file__).with_name("compiled.py")
CSRC_SUFFIXES = (".h", ".cuh", ".cc", ".cu")


def _installed() -> Path:
    """The library that `pip install` put beside the distribution's metadata.

    It is not looked up beside this file: Python that runs from a clone, or is installed with `-e`, lies
    in the source tree, which has no library. Without metadata there is no other place to look at.
    """
    library = "sglang_nsa_plugin/lib/nsa_metadata.so"
    try:
        distribution = importlib.metadata.distribution("sglang-nsa-plugin")
    except importlib.metadata.PackageNotFoundError:
        return ROOT / library
    return Path(str(distribution.locate_file(library)))


LIBRARY = _installed()


class LibraryUnavailableError(RuntimeError):
    """The compiled library cannot be used; the message says why and what to do."""


@functools.cache
def load() -> Any:
    """The library as a TVM FFI module. No other path is tried.

    Raises:
        LibraryUnavailableError: TVM FFI or the library is missing, it does not load, its errors do not
            arrive, or it was built from other sources than the Python that loads it.
    """
    if not LIBRARY.is_file():
        raise LibraryUnavailableError(
            f"the compiled library {LIBRARY} is missing; install the wheel, or build it with "
            "`pip install .`"
        )
    missing = _missing_bytes(LIBRARY.read_bytes())
    if missing > 0:
        raise LibraryUnavailableError(
            f"the compiled library {LIBRARY} is truncated, its last {missing} bytes are missing; "
            "reinstall sglang-nsa-plugin"
        )
    try:
        import tvm_ffi
    except ImportError as error:
        raise LibraryUnavailableError(
            f"apache-tvm-ffi cannot be imported ({error}); install {TVM_FFI}"
        ) from error
    try:
        module = tvm_ffi.load_module(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        raise LibraryUnavailableError(
            f"the compiled library {LIBRARY} does not load with apache-tvm-ffi "
            f"{tvm_ffi.__version__}: {error}; reinstall sglang-nsa-plugin"
        ) from error
    if _loses_errors(module):
        raise LibraryUnavailableError(
            f"apache-tvm-ffi {tvm_ffi.__version__} loses the errors of compiled libraries, so a fill "
            f"that fails would pass for done; install {TVM_FFI}"
        )
    why_not = _why_of_other_sources(module)
    if why_not is not None:
        raise LibraryUnavailableError(why_not)
    return module


def has_cuda() -> bool:
    """Whether the library was built with its CUDA kernels.

    Raises:
        LibraryUnavailableError: as :func:`load`.
    """
    return bool(load()["has_cuda"]())


def _missing_bytes(elf: bytes) -> int:
    """How many bytes of an ELF file are missing. Loading a truncated one ends the process (bus error).

    The table of sections is the last thing in the file.
    """
    if len(elf) < ELF_HEADER_BYTES or not elf.startswith(b"\x7fELF"):
        return 0  # not a library at all: the loader refuses it in words
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries = struct.unpack_from("<HH", elf, 0x3A)
    return int(table + entry_size * entries - len(elf))


def _loses_errors(module: Any) -> bool:
    """Whether an error that is asked for does not arrive: ``bind`` takes more than two arguments.

    One of them is a tensor, because 0.1.8.post0 loses the errors of calls with tensors only.
    """
    try:
        module["bind"](0, torch.empty(0))
    except ValueError:
        return False
    return True


def _why_of_other_sources(module: Any) -> str | None:
    """Why the library does not belong to this Python, or None.

    The file that packs its arguments is always compared; csrc/ is compared in a source tree, which has
    it.
    """
    sources = [("packer_id", PACKER, _sha256(PACKER))]
    csrc = ROOT / "csrc"
    in_source_tree = (csrc / "binding.cc").is_file()
    if in_source_tree:
        sources.append(("csrc_id", csrc, _csrc_id(csrc)))
    for function, path, here in sources:
        built = _built_from(module, function)
        if built != here:
            advice = (
                f"run `pip install .` in {ROOT}" if in_source_tree else "reinstall sglang-nsa-plugin"
            )
            return (
                f"the compiled library {LIBRARY} was built from other sources than this Python: it has "
                f"version {built[:12]} of {path.name}, {path} is version {here[:12]}; {advice}"
            )
    return None


def _built_from(module: Any, function: str) -> str:
    try:
        return str(module[function]())
    except AttributeError:
        return "unknown"  # of a library that was built before it had this function


def _csrc_id(csrc: Path) -> str:
    """A number for all sources of the library, as csrc/CMakeLists.txt computes it."""
    files = [f for f in csrc.iterdir() if f.suffix in CSRC_SUFFIXES or f.name == "CMakeLists.txt"]
    listing = "".join(f"{file.name} {_sha256(file)}\n" for file in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
