"""Keeps the plugin's errors away from SGLang while it serves."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def attempt(call: Callable[..., Result], on_error: Callable[[Exception], Result], *args: Any) -> Result:
    """What the call returns, or what ``on_error`` returns of the error that it raised.

    The one place that catches every error: one that leaves a hook in service ends the server, and all
    that is at stake is a log line, a metric, a comparison, or a fill that SGLang can make itself. What
    SGLang would call without the plugin is called outside, so that its errors stay as they are.
    """
    try:
        return call(*args)
    except Exception as error:
        return on_error(error)


def described(error: Exception) -> str:
    """The error in one line, with the place where it was raised."""
    what = textwrap.shorten(str(error), 300)
    where = "".join(
        f" ({Path(frame.f_code.co_filename).name}:{line})"
        for frame, line in list(traceback.walk_tb(error.__traceback__))[-1:]
    )
    return f"{type(error).__name__}: {what}{where}"
