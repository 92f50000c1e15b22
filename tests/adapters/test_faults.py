"""Faults around the plugin: other plugins, replaced classes, machines that refuse to be written to."""

from __future__ import annotations

import json
import stat

import pytest
from cpu_pair import skip_unless_captured
from isolated import run, run_fresh
from test_plugin import ACTIVATE, PARSE, SPARSE, last_line

BACKEND = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
TARGET = f"{BACKEND}.init_forward_metadata_out_graph"


def test_another_plugin_after_ours_does_not_push_it_out():
    """P4: SGLang applies hooks once a target; the second plugin is told so by SGLang, and ours stays."""
    skip_unless_captured()
    program = f"""{ACTIVATE}
import pkgutil
ours = pkgutil.resolve_name({TARGET!r})
HookRegistry.register({TARGET!r}, lambda original, *a, **k: None, HookType.AROUND)
HookRegistry.apply_hooks()
print(pkgutil.resolve_name({TARGET!r}) is ours)
"""
    program = program.replace(
        "import logging\n", "import logging\nfrom sglang.srt.plugins.hook_registry import HookType\n", 1
    )
    assert last_line(run(program, json.dumps(SPARSE))) == "True"


@pytest.mark.parametrize("second", ["before", "after"])
def test_registering_twice_changes_nothing(second):
    """Two copies of the package on one path, say: a flag that is added twice would end the start."""
    again = "from sglang_nsa_plugin import plugin\nplugin.register()\n"
    load = "load_plugins()\n"
    program = PARSE.replace(load, again + load if second == "before" else load + again, 1)
    assert last_line(run(program, "--nsa-metadata-backend", "triton")) == "triton"


def test_installing_twice_changes_nothing():
    """P3: the scheduler is made once, but nothing breaks when the adapter is asked for again."""
    program = f"""{ACTIVATE}
from sglang_nsa_plugin.adapters import hooks
from sglang_nsa_plugin.adapters.install import adapter_for_installed
import pkgutil
targets = hooks.applied(adapter_for_installed().common.hooks)
before = {{target: pkgutil.resolve_name(target) for target in targets}}
plugin.activate(SimpleNamespace(**json.loads(sys.argv[1])))
print(bool(before) and all(pkgutil.resolve_name(t) is was for t, was in before.items()))
"""
    assert last_line(run(program, json.dumps(SPARSE))) == "True"


def test_a_class_that_another_plugin_replaced_is_declined_by_what_it_lacks():
    skip_unless_captured()
    replaced = """
from sglang.srt.layers.attention import dsa_backend
class Other:
    def init_cuda_graph_state(self, max_bs, max_num_tokens): ...
dsa_backend.DeepseekSparseAttnBackend = Other
"""
    outcome = json.loads(last_line(run(replaced + ACTIVATE, json.dumps(SPARSE))))
    assert outcome["hooked"] == 0
    assert outcome["record"]["adapter"] is None
    assert "init_forward_metadata_out_graph is missing" in outcome["record"]["reason"]


def test_a_subclass_that_another_plugin_put_in_place_is_hooked_itself():
    """What SGLang makes its backends of is what we hook: methods of the base would not be called."""
    skip_unless_captured()
    replaced = """
from sglang.srt.layers.attention import dsa_backend
class Other(dsa_backend.DeepseekSparseAttnBackend):
    pass
dsa_backend.DeepseekSparseAttnBackend = Other
"""
    shown = 'print("init_forward_metadata_in_graph" in vars(Other))'
    assert last_line(run(f"{replaced}{ACTIVATE}\n{shown}", json.dumps(SPARSE))) == "True"


def test_home_and_cache_may_be_read_only(tmp_path):
    """Nothing is built or cached at start: the library is compiled ahead of time."""
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    program = """
import torch
from sglang_nsa_plugin import dispatch, self_test
choice = dispatch.choose("cpu", torch.device("cpu"))
args = self_test.small_case(torch.device("cpu"), False)
choice.bind(args)()
print(choice.name, args.cache_seqlens.tolist())
"""
    done = run_fresh(program, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "cpu"
    assert list(home.iterdir()) == []  # whoever runs as root may write all the same
