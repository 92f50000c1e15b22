"""SGLang's configuration as it was decided, whichever way a release keeps it."""

from __future__ import annotations

from typing import Any


def resolved(server_args: Any) -> Any:
    """A view of the arguments with SGLang's decisions in it.

    Up to 0.5.18 SGLang writes its decisions, such as the attention backend of a model, into the
    arguments; later releases leave those as the user gave them and keep decisions beside them.
    """
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        return server_args
    return resolved_view(server_args)
