"""The command lines of docs/recipes.md, read by the parser of each SGLang release that they name.

The release is the installed one: `make test` takes one of them, `make test-releases` takes all.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from isolated import run

from integration.releases.install_sglang import release_key
from sglang_nsa_plugin.adapters.releases import SGLANG, TESTED

TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(
    r"([^\n]*)\n\n```bash\n(.*?)\n```", TEXT, re.DOTALL
)  # each after a line that introduces it
FAMILIES = ("deepseek-ai/DeepSeek-V3.2", *(f"zai-org/GLM-5{minor}" for minor in ("", ".1", ".2", ".3")))
# SGLang's launcher, up to the point where it would start the server.
PARSE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang_nsa_plugin import options
for line in json.loads(sys.argv[1]):
    args = prepare_server_args(line)
    names = ("model_path", "tp_size", "speculative_algorithm", "speculative_num_steps",
             "speculative_num_draft_tokens", "speculative_eagle_topk")
    print("asked", json.dumps({**{name: getattr(args, name) for name in names},
                               "backend": options.backend_of(args)}))
"""


class Recipe(NamedTuple):
    """A command line, the line that introduces it, and the first and the last release named there."""

    command: str
    introduction: str
    first: str
    last: str

    @property
    def model(self) -> str:
        words = shlex.split(self.command)
        return words[words.index("--model-path") + 1]

    def names(self, release: str) -> bool:
        return release_key(self.first) <= release_key(release) <= release_key(self.last)


def recipes() -> list[Recipe]:
    found = []
    for introduction, command in BLOCKS:
        ((first, last),) = re.findall(r"SGLang ([\w.]+\w) to ([\w.]+\w)[.;]", introduction)
        found.append(Recipe(command.replace("\\\n", ""), introduction, first, last))
    return found


def arguments(command: str) -> list[str]:
    """Those of a command line, and a flag of the plugin's; SGLang looks for no model named dummy."""
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("sglang", "serve")
    words[words.index("--model-path") + 1] = "dummy"
    return [*words, "--nsa-metadata-backend", "triton"]


def test_every_command_names_its_releases_and_every_model_is_there():
    assert len(recipes()) == TEXT.count("sglang serve ") > 10
    assert all({recipe.first, recipe.last} <= {*TESTED} for recipe in recipes())
    models = [recipe.model for recipe in recipes()]
    assert [family for family in FAMILIES if not any(name.startswith(family) for name in models)] == []
    assert not any("Flash" in name for name in models)


def test_this_release_parses_every_recipe_that_names_it():
    release = SGLANG.partition("+")[0]
    chosen = [recipe for recipe in recipes() if recipe.names(release)]
    assert chosen
    done = run(PARSE, json.dumps([arguments(recipe.command) for recipe in chosen]))
    assert done.returncode == 0, done.stderr[-3000:]
    asked = [json.loads(each) for each in re.findall(r"^asked (.*)$", done.stdout, re.MULTILINE)]
    assert len(asked) == len(chosen)
    for recipe, args in zip(chosen, asked, strict=True):
        assert args["speculative_algorithm"] == "EAGLE"
        assert args["speculative_eagle_topk"] == 1
        assert args["speculative_num_draft_tokens"] == args["speculative_num_steps"] + 1
        assert args["backend"] == "triton"
        assert f"--tp {args['tp_size']} " in recipe.command


@pytest.mark.parametrize("flag", ["--nsa-metadata-rolls", "--speculative-steps-num"])
def test_a_flag_that_is_not_there_is_refused(flag):
    done = run(PARSE, json.dumps([[*arguments(recipes()[0].command), flag, "1"]]))
    assert done.returncode == 2
    assert flag in done.stderr


def test_a_recipe_of_one_speculative_step_says_that_draft_decode_is_not_filled():
    for recipe in recipes():
        is_one_step = "--speculative-num-steps 1 " in recipe.command
        assert is_one_step == ("no draft-decode plan" in recipe.introduction)
