"""Draft-extend metadata for SGLang's NSA/DSA sparse attention, filled by one kernel launch.

Importing this package starts no CUDA context and needs no SGLang. ``fill_args.py`` has the contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_nsa_plugin import state

if TYPE_CHECKING:
    from sglang_nsa_plugin.api import (
        BoundFill,
        bind,
        fill,
        fill_draft_extend_metadata_cuda,
        fill_draft_extend_metadata_cuda_adaptive,
    )
    from sglang_nsa_plugin.fill_args import FillArgs

__version__ = state.VERSION

__all__ = [
    "BoundFill",
    "FillArgs",
    "__version__",
    "bind",
    "fill",
    "fill_draft_extend_metadata_cuda",
    "fill_draft_extend_metadata_cuda_adaptive",
]


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang_nsa_plugin import api, fill_args

    return fill_args.FillArgs if name == "FillArgs" else getattr(api, name)
