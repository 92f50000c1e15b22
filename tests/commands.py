"""Runs ``sglang-nsa-plugin`` in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version

import pytest

TIME_LIMIT_S = 120


def _sglang() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


SGLANG = _sglang()
needs_sglang = pytest.mark.skipif(SGLANG is None, reason="needs SGLang in this Python")


def command(
    *arguments: str, encoding: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``sglang-nsa-plugin`` with these arguments; its output is not a terminal."""
    return python("-m", "sglang_nsa_plugin", *arguments, encoding=encoding, **environment)


def program(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, after Python code (``text``) that changes what the command finds."""
    main = "import sys; from sglang_nsa_plugin.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return python("-c", f"{text}\n{main}", *arguments, **environment)


def python(
    *arguments: str, encoding: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python in an empty folder, without the environment variables that the plugin reads."""
    dropped = ("SGLANG_", "TRITON_", "FORCE_COLOR", "COLUMNS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**clean, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            encoding=encoding,
            timeout=TIME_LIMIT_S,
            check=False,
        )
