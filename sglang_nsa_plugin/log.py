"""The plugin's loggers: below SGLang's, so that its level, format and configuration file hold."""

from __future__ import annotations

import logging

PACKAGE = "sglang_nsa_plugin"
NAME = "sglang.nsa_plugin"


def logger_of(module: str) -> logging.Logger:
    """The logger of a module of this package, such as ``sglang.nsa_plugin.plugin`` of ``plugin``."""
    return logging.getLogger(NAME + module.removeprefix(PACKAGE))
