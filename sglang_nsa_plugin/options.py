"""The server flag and the environment variable, and what they come to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

CHOICES = ("auto", "cuda", "triton", "torch", "off")
DEFAULT = "auto"
FLAG, ALIAS = "--nsa-metadata-backend", "--dsa-metadata-backend"
VARIABLE = "SGLANG_NSA_METADATA_BACKEND"
# SGLang copies only its own fields from the command line; an underscore attribute on its arguments
# is carried to every process and is left alone by its resolution of arguments.
ATTRIBUTE = "_nsa_metadata_backend"

HELP = (
    "Who fills the draft-extend metadata of NSA/DSA sparse attention (sglang-nsa-plugin): auto takes "
    "the compiled CUDA kernel and steps aside where it cannot run; cuda, triton and torch insist on "
    f"one; off leaves the fill to SGLang. Environment: {VARIABLE}. Default: {DEFAULT}."
)


def from_environment() -> str | None:
    """The variable's value, or None where it is unset or empty.

    Raises:
        SystemExit: it is none of :data:`CHOICES`. SGLang logs and forgets a plugin's ordinary errors;
            a mistyped setting must not be forgotten.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value and value not in CHOICES:
        raise SystemExit(
            f"sglang-nsa-plugin: {VARIABLE}: must be one of {', '.join(CHOICES)}, got {value!r}"
        )
    return value or None


def backend_of(server_args: object) -> str:
    """The backend that was asked for: the flag wins over the environment, else the default."""
    return getattr(server_args, ATTRIBUTE, None) or from_environment() or DEFAULT


def add_flag(original: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    """Around ``ServerArgs.add_cli_args``: adds the flag and its alias."""
    result = original(parser)
    parser.add_argument(FLAG, ALIAS, choices=CHOICES, default=None, help=HELP)
    return result


def keep_flag(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: keeps the flag's value with SGLang's arguments."""
    server_args = original(cls, args)
    setattr(server_args, ATTRIBUTE, getattr(args, "nsa_metadata_backend", None))
    return server_args
