"""The SGLang releases whose own fill the adapters were compared with, value by value.

The list decides nothing: an adapter fits a release by what that release has.
"""

from __future__ import annotations

import sys

from sglang_nsa_plugin.state import version_of

TESTED = (
    "0.5.11",
    "0.5.12.post1",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
)


def _running() -> str:
    """The version that the loaded SGLang gives itself, also from a source tree without dist-info."""
    loaded = getattr(sys.modules.get("sglang"), "__version__", None)
    return str(loaded) if loaded else version_of("sglang")


SGLANG = _running()  # read once, as state.VERSION is


def why_untested(version: str) -> str | None:
    """A warning for a server with this SGLang, or None when the release is tested."""
    if version.partition("+")[0] in TESTED:  # after the plus: who built it
        return None
    newer = _key(version) > _key(TESTED[-1])
    what = f"newer than any tested release ({TESTED[-1]})" if newer else "not a tested release"
    return (
        f"SGLang {version} is {what}: everything that the plugin uses is there; compare its fill with "
        "SGLang's own by starting with --nsa-metadata-check 1"
    )


def _key(version: str) -> tuple[int, ...]:
    """The leading numbers: '0.5.15.post1' -> (0, 5, 15), '0.6.0rc1' -> (0, 6, 0)."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
