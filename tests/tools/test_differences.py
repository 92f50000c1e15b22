"""What differs between SGLang releases; the installed one knows every option that it is given."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from integration.releases import differences, matrix
from integration.serving import ab_servers
from integration.serving.ab_servers import serve_args

SERVING = Path(ab_servers.__file__).parent


@pytest.mark.parametrize(
    ("release", "expected", "absent"),
    [
        (
            "0.5.12.post1",
            ["--nsa-decode-backend", "--disable-piecewise-cuda-graph", "--cuda-graph-max-bs"],
            "--dsa",
        ),
        ("0.5.13.post1", ["--dsa-decode-backend", "--disable-piecewise-cuda-graph"], "--nsa"),
        ("0.5.14", ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode"], "--nsa"),
        ("0.5.23", ["--dsa-decode-backend", "--cuda-graph-max-bs-decode"], "--nsa"),
    ],
)
def test_options_are_spelled_as_the_release_spells_them(monkeypatch, release, expected, absent):
    monkeypatch.setattr(differences, "version", lambda name: release)
    options = serve_args()
    assert set(expected) <= set(options)
    assert not any(option.startswith(absent) for option in options)


@pytest.mark.parametrize("release", [*matrix.tested_releases(), "0.6.0"])
def test_every_release_and_those_to_come_have_each_of_them(release):
    tables = [value for value in vars(differences).values() if isinstance(value, tuple)]
    assert len(tables) == 5
    for table in tables:
        assert differences.of(table, release)


def test_a_release_that_is_too_old_is_named():
    with pytest.raises(ValueError, match=r"release: must be 0\.5\.11 or newer, got 0\.5\.9"):
        differences.of(differences.SPARSE, "0.5.9")


def test_the_installed_release_knows_every_option_of_every_server():
    """SGLang's own parser. An option that is short for several others ends it, too."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    from sglang_nsa_plugin import options

    parser = argparse.ArgumentParser()
    options.add_flags(ServerArgs.add_cli_args, parser)
    modules = [importlib.import_module(f"integration.serving.{path.stem}") for path in files()]
    setups = [setup for module in modules for setup in getattr(module, "SETUPS", ())]
    assert len(setups) > 20
    for setup in setups:
        arguments = ["--model-path", "MODEL", *setup.args]
        try:
            parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"setup {setup.name}: SGLang refuses {shlex.join(arguments)}")


def files():
    return sorted(SERVING.glob("test_*.py"))
