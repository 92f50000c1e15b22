"""Flags from SGLang's YAML file, and mistyped variables where nobody sees the process end."""

from __future__ import annotations

import pytest
from isolated import run
from test_plugin import LOAD, last_line

from sglang_nsa_plugin.options import CHECK_VARIABLE, ROLES_VARIABLE, VARIABLE, WIDE_VARIABLE

# As SGLang's launcher reads its command line, but for the model, which ServerArgs would look at.
FROM_YAML = (
    LOAD
    + """
import argparse
from sglang.srt.server_args import ServerArgs
try:
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
except ImportError:  # up to 0.5.18
    from sglang.srt.server_args_config_parser import ConfigArgumentMerger
from sglang_nsa_plugin import options
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
try:
    merger = ConfigArgumentMerger(parser)
except TypeError:  # of releases whose merger takes names
    merger = ConfigArgumentMerger()
argv = merger.merge_config_with_args(["--config", sys.argv[1], *sys.argv[2:]])
args = ServerArgs.from_cli_args(parser.parse_args(argv))
print(options.backend_of(args), options.check_of(args), ",".join(options.roles_of(args)))
print(options.wide_tables_of(args), file=sys.stderr)
"""
)


def from_yaml(folder, text: str, *arguments: str, **environment: str):
    config = folder / "server.yaml"
    config.write_text(f"model-path: dummy\n{text}\n")
    return run(FROM_YAML, str(config), *arguments, **environment)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("nsa-metadata-backend: off", (), "off 0"),
        ("nsa-metadata-backend: 'off'", (), "off 0"),
        ("nsa-metadata-backend: no", (), "off 0"),
        ("nsa-metadata-backend: 'False'", (), "off 0"),
        ("nsa-metadata-backend: 0", (), "off 0"),
        ("dsa-metadata-backend: off", (), "off 0"),
        ("nsa-metadata-backend: triton", (), "triton 0"),
        ("nsa-metadata-backend: off", ("--nsa-metadata-backend", "torch"), "torch 0"),
        ("nsa-metadata-check: 100", (), "auto 100"),
        ("nsa-metadata-check: off", (), "auto 0"),
        ("nsa-metadata-check: '7'", (), "auto 7"),
        ("nsa-metadata-roles: draft-extend,verify", (), "auto 0 draft-extend,verify"),
        ("nsa-metadata-roles: [verify, draft-extend]", (), "auto 0 draft-extend,verify"),
        ("nsa-metadata-roles: verify", (), "auto 0 verify"),
        ("nsa-metadata-roles: [decode, verify]", (), "auto 0 verify,decode"),
        (
            "nsa-metadata-roles: verify",
            ("--nsa-metadata-roles", "draft-extend"),
            "auto 0 draft-extend",
        ),
        ("", ("--nsa-metadata-roles", "verify,draft-extend"), "auto 0 draft-extend,verify"),
        ("", ("--nsa-metadata-roles", "draft-extend", "verify"), "auto 0 draft-extend,verify"),
    ],
)
def test_sglangs_yaml_file(text, arguments, expected, tmp_path):
    roles = "" if expected.count(" ") == 2 else " draft-extend,draft-decode,verify"
    assert last_line(from_yaml(tmp_path, text, *arguments)) == f"{expected}{roles}"


@pytest.mark.parametrize("value", ["verify", " draft-extend , verify", "verify,"])
def test_the_roles_variable(value, tmp_path):
    done = from_yaml(tmp_path, "", **{ROLES_VARIABLE: value})
    expected = "draft-extend,verify" if "draft" in value else "verify"
    assert last_line(done) == f"auto 0 {expected}"


@pytest.mark.parametrize(
    ("text", "arguments", "variable", "expected"),
    [
        ("", (), "", "auto"),
        ("", (), "keep", "keep"),
        ("nsa-metadata-wide-tables: keep", (), "", "keep"),
        ("nsa-metadata-wide-tables: keep", ("--nsa-metadata-wide-tables", "auto"), "keep", "auto"),
    ],
)
def test_the_wide_tables(text, arguments, variable, expected, tmp_path):
    done = from_yaml(tmp_path, text, *arguments, **{WIDE_VARIABLE: variable})
    assert done.stderr.splitlines()[-1] == expected


def test_off_in_yaml_wins_over_the_variables(tmp_path):
    text = "nsa-metadata-backend: off\nnsa-metadata-check: off"
    done = from_yaml(tmp_path, text, **{VARIABLE: "torch", CHECK_VARIABLE: "7"})
    assert last_line(done) == "off 0 draft-extend,draft-decode,verify"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "nsa-metadata-backend: on",
            "must be one of auto, cuda, triton, torch, off, got 'true'; for the plugin's own choice, "
            "set auto",
        ),
        ("dsa-metadata-backend:", "must be one of auto, cuda, triton, torch, off, got 'None'"),
        ("nsa-metadata-check: true", "must be a whole number, 0 or more, got 'true'"),
        ("nsa-metadata-check: 2.5", "must be a whole number, 0 or more, got '2.5'"),
        (
            "nsa-metadata-roles: [verify, prefill]",
            "must be of draft-extend, draft-decode, verify, decode, got prefill",
        ),
        (
            "nsa-metadata-roles: Verify,draft",
            "must be of draft-extend, draft-decode, verify, decode, got Verify, draft",
        ),
        ("nsa-metadata-roles:", "must be of draft-extend, draft-decode, verify, decode, got None"),
        ("nsa-metadata-wide-tables: no", "must be one of auto, keep, got 'false'"),
    ],
)
def test_another_value_in_yaml_ends_with_the_choices(text, said, tmp_path):
    done = from_yaml(tmp_path, text)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("word", ["off", "OFF", "false", "no", "0"])
def test_the_variable_takes_the_same_words(word, monkeypatch):
    from sglang_nsa_plugin import options

    monkeypatch.setenv(VARIABLE, word)
    assert options.backend_of(object()) == "off"


# SGLang embedded in a program that starts it in a thread.
IN_A_THREAD = """
import logging, sys, threading
from sglang.srt.plugins import load_plugins
logging.basicConfig(level=logging.ERROR, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
thread = threading.Thread(target=load_plugins)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (VARIABLE, "CUDA", "must be one of auto, cuda, triton, torch, off, got 'CUDA'"),
        (CHECK_VARIABLE, "often", "must be a whole number, 0 or more, got 'often'"),
        (WIDE_VARIABLE, "drop", "must be one of auto, keep, got 'drop'"),
        (ROLES_VARIABLE, "all", "must be of draft-extend, draft-decode, verify, decode, got all"),
    ],
)
def test_a_mistyped_variable_is_logged_where_a_thread_ends_without_a_word(variable, value, said):
    done = run(IN_A_THREAD, **{variable: value})
    assert done.stdout.splitlines() == [
        f"ERROR sglang.nsa_plugin.plugin sglang-nsa-plugin: {variable}: {said}"
    ]
