"""The plugin's loggers: below SGLang's, so that its level, format and configuration file hold."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sglang_nsa_plugin.containment import attempt, described

PACKAGE = "sglang_nsa_plugin"
NAME = "sglang.nsa_plugin"
_CALLER = 5  # the frame that a line is from, as `logging` counts them

_lost: set[str] = set()


class Logger:
    """A logger that loses a line where logging fails, in a filter for example, and raises nothing."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, message: str, *values: object) -> None:
        """Logs at level INFO."""
        self._log(logging.INFO, message, values)

    def warning(self, message: str, *values: object) -> None:
        """Logs at level WARNING."""
        self._log(logging.WARNING, message, values)

    def error(self, message: str, *values: object) -> None:
        """Logs at level ERROR."""
        self._log(logging.ERROR, message, values)

    def _log(self, level: int, message: str, values: tuple[object, ...]) -> None:
        log = self._logger.log
        attempt(lambda: log(level, message, *values, stacklevel=_CALLER), lambda _: None)


def logger_of(module: str) -> Logger:
    """The logger of a module of this package, such as ``sglang.nsa_plugin.plugin`` of ``plugin``."""
    return Logger(NAME + module.removeprefix(PACKAGE))


def loses(what: str) -> Callable[[Exception], None]:
    """What to do on an error that costs this much: logs the first one."""

    def report(error: Exception) -> None:
        if what not in _lost:
            _lost.add(what)
            logger.error(
                "sglang-nsa-plugin: %s is lost: %s. Nothing else is, and further errors of this kind "
                "are not logged; please report this line",
                what,
                described(error),
            )

    return report


logger = logger_of(__name__)
