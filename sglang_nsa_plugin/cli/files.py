"""Files that a command is asked to write: looked at before it measures, written before it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGES = (".png", ".svg")


def raise_if_unwritable(option: str, path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """So that a mistyped name costs no minutes.

    Raises:
        RuntimeError: the file cannot be written there. The message names the option and the rule.
    """
    if path is None:
        return
    name = Path(path)
    if not path or name.is_dir():
        raise RuntimeError(f"{option} must name a file, got {path!r}")
    if suffixes and name.suffix.lower() not in suffixes:
        raise RuntimeError(f"{option} must end in {' or '.join(suffixes)}, got {path!r}")
    if not name.parent.is_dir():
        raise RuntimeError(f"{option} {path}: there is no folder {name.parent}; make it first")


def write_json(option: str, path: str | None, result: dict[str, Any]) -> None:
    """The result as JSON, if a file is asked for.

    Raises:
        RuntimeError: it cannot be written. The message names the option and the file.
    """
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise RuntimeError(f"{option} {path}: could not be written: {error.strerror}") from error
