"""SGLang's resolved configuration, wherever a release keeps it."""

from __future__ import annotations

from typing import Any


def resolved(server_args: Any) -> Any:
    """The server arguments with SGLang's decisions in them, such as a model's attention backend.

    Up to 0.5.18 SGLang writes its decisions into the arguments. Later releases leave the arguments as
    the user gave them and keep the decisions elsewhere.
    """
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        return server_args
    return resolved_view(server_args)
