"""What --json and --plot name: looked at before a command measures, written before it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGES = (".png", ".svg")


def raise_if_unwritable(json_path: str | None, plot_path: str | None = None) -> None:
    """So that a mistyped name costs no minutes.

    Raises:
        RuntimeError: a file cannot be written there. The message names the option and the rule.
    """
    for option, path, suffixes in (("--json", json_path, ()), ("--plot", plot_path, IMAGES)):
        if path is not None:
            _raise_if_unwritable(option, path, suffixes)


def _raise_if_unwritable(option: str, path: str, suffixes: tuple[str, ...]) -> None:
    name = Path(path)
    if not path or name.is_dir():
        raise RuntimeError(f"{option} must name a file, got {path!r}")
    if suffixes and name.suffix.lower() not in suffixes:
        raise RuntimeError(f"{option} must end in {' or '.join(suffixes)}, got {path!r}")
    if not name.parent.is_dir():
        raise RuntimeError(f"{option} {path}: there is no folder {name.parent}; make it first")


def write_and_show(
    result: dict[str, Any],
    json_path: str | None,
    show: Callable[[], None],
    draw: Callable[[], None] | None = None,
) -> None:
    """Writes the files that are asked for, then prints: standard output may be a pipe that has ended.

    Raises:
        RuntimeError: the JSON file cannot be written. The result is printed all the same.
    """
    try:
        if json_path is not None:
            _write_json(json_path, result)
        if draw is not None:
            draw()
    finally:
        show()


def _write_json(path: str, result: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise RuntimeError(f"--json {path}: could not be written: {error.strerror}") from error
