"""The plugin's log lines go where SGLang's go, as SGLang's own configuration of the log has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from isolated import run

import sglang_nsa_plugin

# SGLang reads the file in each process; then an idle server's INFO line and a fallback's WARNING.
LINES = """
import sys
from types import SimpleNamespace
from sglang.srt.utils import configure_logger
from sglang_nsa_plugin import plugin
from sglang_nsa_plugin.adapters.fallbacks import FallbackReason, count_fallback
configure_logger(SimpleNamespace(log_level="info"))
plugin.activate(SimpleNamespace(_nsa_metadata_backend="off"))
count_fallback(FallbackReason.NO_REQUESTS)
"""
INFO = re.compile(r"sglang-nsa-plugin \S+: not used: switched off;")
WARNING = re.compile(r"sglang-nsa-plugin: SGLang filled this draft-extend step: ")
MARK = "operators: "


def lines_with(folder: Path, **sglang: object):
    """Standard output and errors of a process whose file configures the logger `sglang`, alone."""
    handler = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "ours"}
    config = {
        "version": 1,
        "formatters": {"ours": {"format": f"{MARK}%(levelname)s %(message)s"}},
        "handlers": {"out": handler},
        "loggers": {"sglang": {"handlers": ["out"], "propagate": False, **sglang}},
    }
    path = folder / "logging.json"
    path.write_text(json.dumps(config))
    done = run(LINES, SGLANG_LOGGING_CONFIG_PATH=str(path))
    assert done.returncode == 0, done.stderr
    assert "sglang-nsa-plugin" not in done.stderr  # logging's last resort
    return [line for line in done.stdout.splitlines() if "sglang-nsa-plugin" in line]


def test_a_logger_of_sglang_alone_has_our_lines_in_its_format(tmp_path):
    info, warning = lines_with(tmp_path, level="INFO")
    assert INFO.match(info.removeprefix(f"{MARK}INFO "))
    assert WARNING.match(warning.removeprefix(f"{MARK}WARNING "))


@pytest.mark.parametrize(("level", "lines"), [("WARNING", 1), ("ERROR", 0)])
def test_its_level_holds_for_ours(level, lines, tmp_path):
    assert len(lines_with(tmp_path, level=level)) == lines


def test_without_a_file_they_look_like_sglangs():
    done = run(LINES)
    ours = [line for line in done.stderr.splitlines() if "sglang-nsa-plugin" in line]
    assert [re.sub(r"^\[[^]]*\] ", "", line).split(":")[0] for line in ours] == [
        f"sglang-nsa-plugin {sglang_nsa_plugin.state.VERSION}",
        "sglang-nsa-plugin",
    ]
    assert all(re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in ours)


def test_every_logger_of_the_package_lies_below_sglangs():
    package = Path(sglang_nsa_plugin.__file__).parent
    makers = [file.name for file in package.rglob("*.py") if "getLogger(" in file.read_text()]
    assert makers == ["log.py"]
