"""Finds and loads the compiled library of this package, and binds fills with it."""

from __future__ import annotations

import functools
import importlib.metadata
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_nsa_plugin.fill_args import FillArgs

ELF_HEADER_BYTES = 64
DISTRIBUTION = "sglang-nsa-plugin"
NAME = "nsa_metadata.so"


def _installed() -> Path:
    """Where the installed distribution keeps the library: also for Python of a source tree, which has none."""
    files = importlib.metadata.files(DISTRIBUTION) or []
    return next((Path(str(file.locate())) for file in files if file.name == NAME), Path(NAME))


LIBRARY = _installed()


class LibraryUnavailableError(RuntimeError):
    """The compiled library cannot be used; the message says why and what to do."""


@functools.cache
def load() -> Any:
    """The library as a TVM FFI module, loaded from this package and from nowhere else.

    Raises:
        LibraryUnavailableError: TVM FFI or the library is missing, or it does not load.
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
            f"apache-tvm-ffi cannot be imported ({error}); install apache-tvm-ffi>=0.1.5,<0.2"
        ) from error
    try:
        return tvm_ffi.load_module(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        raise LibraryUnavailableError(
            f"the compiled library {LIBRARY} does not load with apache-tvm-ffi "
            f"{tvm_ffi.__version__}: {error}; reinstall sglang-nsa-plugin"
        ) from error


def _missing_bytes(elf: bytes) -> int:
    """How much of an ELF file is not there; loading such a one ends the process with a bus error.

    The table of sections is the last thing in the file.
    """
    if len(elf) < ELF_HEADER_BYTES or not elf.startswith(b"\x7fELF"):
        return 0  # no library at all, which the loader refuses in words
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries = struct.unpack_from("<HH", elf, 0x3A)
    return int(table + entry_size * entries - len(elf))


def has_cuda() -> bool:
    """Whether the library was built with its CUDA kernel.

    Raises:
        LibraryUnavailableError: as :func:`load`.
    """
    return bool(load()["has_cuda"]())


def bind(args: FillArgs, max_blocks: int = 0) -> Callable[[int], None]:
    """Packs ``args`` once and returns a function of the stream to launch on, as an address.

    ``max_blocks`` limits the CUDA grid of a ragged fill; 0 leaves it to the shapes and the GPU. The
    caller keeps the tensors of ``args`` alive.
    """
    static = args.extend_lens if isinstance(args.extend_lens, int) else 0
    ragged = args.extend_lens if isinstance(args.extend_lens, torch.Tensor) else None
    bound: Callable[[int], None] = load()["bind"](
        max_blocks,
        args.seq_lens,
        args.req_pool_indices,
        args.req_to_token,
        ragged,
        static,
        args.index_topk,
        args.page_size,
        args.cache_seqlens,
        args.cu_seqlens_k,
        args.seqlens_expanded,
        args.nsa_cache_seqlens,
        args.nsa_cu_seqlens_k,
        args.ctx_lens,
        args.page_table_1,
        args.real_page_table,
        args.row_count,
        args.mqa_schedule,
        args.mqa_remainder_last,
        args.enabled,
    )
    return bound
