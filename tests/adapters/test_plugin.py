"""The plugin in SGLang's own framework: discovery, flag, environment, off, what registering costs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cpu_pair import skip_unless_captured
from isolated import run, run_fresh

from sglang_nsa_plugin.adapters.releases import TESTED

LOAD = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
"""
PARSE = (
    LOAD
    + """
import argparse, pickle
from sglang.srt.server_args import ServerArgs
from sglang_nsa_plugin import options
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
args = ServerArgs.from_cli_args(parser.parse_args(["--model-path", "dummy", *sys.argv[1:]]))
args = pickle.loads(pickle.dumps(args))
print(options.backend_of(args))
"""
)
CHECK = PARSE.replace("backend_of", "check_of")


def with_library(program: str, change: str) -> str:
    """The program where the compiled library is another than it should be."""
    line = f"from sglang_nsa_plugin.kernels import library; {change}"
    return program.replace("parser = argparse", f"{line}\nparser = argparse")


def without_library(program: str, folder: Path) -> str:
    gone = str(folder / "gone.so")
    return with_library(program, f"import pathlib; library.LIBRARY = pathlib.Path({gone!r})")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_registering_loads_no_gpu_module_and_no_cuda_context():
    """Beside SGLang's argument module, which every process that loads plugins needs anyway."""
    program = (
        "import sglang.srt.server_args\n"
        + LOAD
        + """
import torch
loaded = [m for m in sys.modules if m.startswith("sglang.") and (
    "attention" in m or "model_runner" in m or "scheduler" in m or "speculative" in m)]
print(json.dumps({"hooked": sorted(HookRegistry._patched), "loaded": loaded,
                  "kernels": "sglang_nsa_plugin.kernels" in sys.modules,
                  "sgl_kernel": "sgl_kernel" in sys.modules,
                  "cuda": torch.cuda.is_initialized()}))
"""
    )
    without = json.loads(last_line(run_fresh(program, SGLANG_PLUGINS="another")))
    found = json.loads(last_line(run_fresh(program)))
    assert without["hooked"] == []
    assert found["hooked"] == [
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
    ]
    assert found["loaded"] == without["loaded"]
    assert found["kernels"] == found["sgl_kernel"]  # which gets the two plain functions
    assert not found["cuda"]


@pytest.mark.parametrize(
    ("plugins", "loads"),
    [
        ("nsa", True),
        ("other, nsa", True),
        ("nas", False),
        ("other", False),
        ("", True),
        (" ", False),
    ],
)
def test_sglang_plugins_selects_by_name(plugins, loads):
    """`verify` foretells it. Blanks are an empty list to SGLang; an empty variable is no list."""
    program = f"""{LOAD}
from sglang_nsa_plugin.cli import environment
hooked = "sglang.srt.server_args.ServerArgs.add_cli_args" in HookRegistry._patched
print(json.dumps([hooked, environment.discovery()["loads"]]))
"""
    assert json.loads(last_line(run(program, SGLANG_PLUGINS=plugins))) == [loads, loads]


def test_scheduler_is_hooked_where_it_is_loaded():
    program = (
        "import sglang.srt.managers.scheduler\n"
        + LOAD
        + "print(json.dumps(sorted(t.rsplit('.', 1)[1] for t in HookRegistry._patched)))"
    )
    assert json.loads(last_line(run(program))) == [
        "__init__",
        "add_cli_args",
        "configure_scheduler_process",
        "from_cli_args",
        "get_init_info",
        "get_internal_state",
        "set_internal_state",
    ]


LOGGED = """
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(name)s %(message)s")
"""
FOREIGN = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
HookRegistry.register(TARGET, lambda original, *a, **k: original(*a, **k), HookType.AROUND)
HookRegistry.apply_hooks()
"""
SCHEDULER = """
from types import SimpleNamespace
import sglang.srt.managers.scheduler as module
module.Scheduler.__init__ = lambda self, server_args, **more: None
module.Scheduler.get_internal_state = lambda self, asked: SimpleNamespace(internal_state={})
"""
USED = """
scheduler = module.Scheduler(server_args=SimpleNamespace(attention_backend="fa3"), gpu_id=0)
print(json.dumps(sorted(scheduler.get_internal_state("all").internal_state)))
"""


def warnings_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = done.stdout.splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith("sglang.nsa_plugin.plugin ")]


def assert_reported(done: subprocess.CompletedProcess[str], target: str) -> None:
    (warning,) = warnings_of(done)
    assert warning.startswith(
        f"sglang-nsa-plugin: another plugin patched {target} before, so the plugin's hook there does "
        "not run. It called HookRegistry.apply_hooks() itself"
    )


def foreign(target: str) -> str:
    return FOREIGN.replace("TARGET", repr(target))


@pytest.mark.parametrize("method", ["add_cli_args", "from_cli_args"])
def test_a_hook_of_the_command_line_that_did_not_take_is_reported_by_the_other(method):
    """SGLang applies hooks after the plugin has registered them: only then can it be seen."""
    target = f"sglang.srt.server_args.ServerArgs.{method}"
    done = run(LOGGED + foreign(target) + PARSE)
    assert last_line(done) == "auto"
    assert_reported(done, target)
    assert warnings_of(run(LOGGED + PARSE)) == []


@pytest.mark.parametrize(
    ("method", "record"), [("__init__", ["nsa_metadata"]), ("get_internal_state", [])]
)
def test_a_hook_of_the_scheduler_that_did_not_take_is_reported_by_the_other(method, record):
    target = f"sglang.srt.managers.scheduler.Scheduler.{method}"
    done = run(LOGGED + SCHEDULER + foreign(target) + LOAD + USED)
    assert json.loads(last_line(done)) == record
    assert_reported(done, target)


def test_hooks_that_took_are_silent():
    done = run(LOGGED + SCHEDULER + LOAD + USED)
    assert json.loads(last_line(done)) == ["nsa_metadata"]
    assert warnings_of(done) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "module.Scheduler.__init__ = lambda self, args: None",
            "Scheduler.__init__ takes (self, args), expected (self, server_args)",
        ),
        ("del module.Scheduler.get_internal_state", "Scheduler.get_internal_state is missing"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_left_alone_with_a_warning(change, said):
    done = run(f"{LOGGED}{SCHEDULER}{change}\n{LOAD}print(sorted(HookRegistry._patched))")
    assert said.split(" ")[0] not in last_line(done)
    (warning,) = warnings_of(done)
    assert warning.startswith("sglang-nsa-plugin: this SGLang does not fit: ")
    assert said in warning


def test_a_scheduler_module_that_is_loaded_later_is_left_alone():
    """A launcher may load it after it has loaded plugins: there are no hooks in it to report on."""
    loaded_later = LOGGED + LOAD + SCHEDULER + PARSE.replace(LOAD, "")
    done = run(loaded_later)
    assert last_line(done) == "auto"
    assert warnings_of(done) == []


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, "auto"),
        (["--nsa-metadata-backend", "triton"], {}, "triton"),
        (["--dsa-metadata-backend", "off"], {}, "off"),
        ([], {"SGLANG_NSA_METADATA_BACKEND": "torch"}, "torch"),
        ([], {"SGLANG_NSA_METADATA_BACKEND": ""}, "auto"),
        (["--nsa-metadata-backend", "off"], {"SGLANG_NSA_METADATA_BACKEND": "torch"}, "off"),
        (["--nsa-metadata-backend=auto"], {"SGLANG_NSA_METADATA_BACKEND": "torch"}, "auto"),
    ],
)
def test_flag_wins_over_environment_and_survives_pickling(arguments, environment, expected):
    assert last_line(run(PARSE, *arguments, **environment)) == expected


def test_unknown_flag_value_ends_with_the_choices():
    done = run(PARSE, "--nsa-metadata-backend", "cudaa")
    assert done.returncode == 2
    assert "must be one of auto, cuda, triton, torch, off, got 'cudaa'" in done.stderr


@pytest.mark.parametrize(
    ("flag", "variable", "every"),
    [
        ([], "", "0"),
        ([], "7", "7"),
        (["--nsa-metadata-check", "3"], "7", "3"),
        (["--nsa-metadata-check", "0"], "7", "0"),
    ],
)
def test_the_shadow_check_comes_from_the_flag_or_the_variable(flag, variable, every):
    assert last_line(run(CHECK, *flag, SGLANG_NSA_METADATA_CHECK=variable)) == every


def test_a_shadow_check_that_is_no_number_ends_the_start():
    done = run(LOAD + "print('started')", SGLANG_NSA_METADATA_CHECK="often")
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "SGLANG_NSA_METADATA_CHECK: must be a whole number, 0 or more, got 'often'" in done.stderr
    flag = run(CHECK, "--nsa-metadata-check", "-1")
    assert flag.returncode != 0
    assert "--nsa-metadata-check: must be a whole number, 0 or more, got '-1'" in flag.stderr


def test_a_shadow_check_ends_start_up_where_the_library_is_missing(tmp_path):
    program = without_library(CHECK, tmp_path)
    done = run(program, "--nsa-metadata-check", "10")
    assert done.returncode != 0
    assert "--nsa-metadata-check cannot run: the compiled library" in done.stderr
    off = run(program, "--nsa-metadata-check", "10", "--nsa-metadata-backend", "off")
    assert off.returncode == 0, off.stderr
    done = run(with_library(CHECK, "library.has_cuda = lambda: False"), "--nsa-metadata-check", "10")
    assert done.returncode != 0
    assert "--nsa-metadata-check cannot run: the library was built without nvcc" in done.stderr


def test_unknown_variable_ends_with_the_choices():
    done = run(LOAD + "print('started')", SGLANG_NSA_METADATA_BACKEND="gpu")
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert (
        "SGLANG_NSA_METADATA_BACKEND: must be one of auto, cuda, triton, torch, off, got 'gpu'"
        in done.stderr
    )


def test_cuda_by_name_ends_start_up_where_the_library_is_missing(tmp_path):
    program = without_library(PARSE, tmp_path)
    done = run(program, "--nsa-metadata-backend", "cuda")
    assert done.returncode != 0
    assert "--nsa-metadata-backend cuda cannot run: the compiled library" in done.stderr
    assert "gone.so is missing; install the wheel" in done.stderr
    assert last_line(run(program)) == "auto"


ACTIVATE = (
    LOAD
    + """
import logging
from types import SimpleNamespace
from sglang_nsa_plugin import plugin
from sglang_nsa_plugin.state import record
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
plugin.activate(SimpleNamespace(**json.loads(sys.argv[1])))
hooked = [t for t in HookRegistry._patched if "server_args" not in t]
print(json.dumps({"record": record(), "hooked": len(hooked)}))
"""
)
SPARSE = {"speculative_algorithm": "EAGLE", "attention_backend": "dsa"}


@pytest.mark.parametrize(
    ("server_args", "reason"),
    [
        ({**SPARSE, "_nsa_metadata_backend": "off"}, "switched off"),
        (
            {"attention_backend": "dsa"},
            "no speculative decoding, so there are no speculative steps to plan",
        ),
        (
            {"speculative_algorithm": "EAGLE", "attention_backend": "fa3"},
            "attention backend fa3 is not NSA/DSA sparse attention",
        ),
    ],
)
def test_sglang_fills_itself_and_one_line_says_why(server_args, reason):
    done = run(ACTIVATE, json.dumps(server_args))
    outcome = json.loads(last_line(done))
    assert outcome["hooked"] == 0
    assert outcome["record"]["adapter"] is None
    assert outcome["record"]["reason"] == reason
    lines = [line for line in done.stdout.splitlines() if line.startswith("sglang-nsa-plugin")]
    assert len(lines) == 1
    roles = "draft-extend, draft-decode, verify"
    assert f"not used: {reason}; SGLang fills {roles} metadata itself" in lines[0]


def test_another_plugin_on_the_same_target_is_named():
    """The registry applies hooks once a target: ours come after and would silently be left out."""
    skip_unless_captured()
    first = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
target = ("sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend."
          "init_forward_metadata_out_graph")
HookRegistry.register(target, lambda original, *a, **k: original(*a, **k), HookType.AROUND)
"""
    done = run(first + ACTIVATE, json.dumps(SPARSE))
    reason = json.loads(last_line(done))["record"]["reason"]
    assert reason.startswith("another plugin patched ")
    assert "init_forward_metadata_out_graph before" in reason

    by_name = run(first + ACTIVATE, json.dumps({**SPARSE, "_nsa_metadata_backend": "cuda"}))
    assert by_name.returncode != 0
    assert "--nsa-metadata-backend cuda was asked for by name and cannot be used" in by_name.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "del dsa_backend.DeepseekSparseAttnBackend._build_topk_v2_plan",
            "_build_topk_v2_plan is missing",
        ),
        (
            "dsa_backend.DeepseekSparseAttnBackend.set_dsa_prefill_impl = lambda self, batch: None",
            "set_dsa_prefill_impl takes (self, batch), expected (self, forward_batch)",
        ),
        (
            "dsa_backend.DeepseekSparseAttnBackend.init_cuda_graph_state = "
            "lambda self, max_bs, max_num_tokens, device: None",
            "init_cuda_graph_state takes (self, max_bs, max_num_tokens, device), "
            "expected (self, max_bs, max_num_tokens)",
        ),
        (
            "del dsa_backend.DSAMetadata.__dataclass_fields__['real_page_table']",
            "DSAMetadata has no field real_page_table",
        ),
        (
            "dsa_backend.DSAMetadata = type('DSAMetadata', (), {'topk_v2_plan': None})",
            "DSAMetadata is not a dataclass",
        ),
        (
            "runner.EAGLEDraftExtendCudaGraphRunner.__init__ = lambda self, eagle_worker: None",
            "EAGLEDraftExtendCudaGraphRunner sets no attribute draft_extend_attn_backend, model_runner",
        ),
        (
            "runner.EAGLEDraftExtendCudaGraphRunner.execute = lambda self, batch, rows: None",
            "execute takes (self, batch, rows), expected (self, forward_batch)",
        ),
        (
            "del draft_utils.DraftBackendFactory._create_dsa_prefill_backend",
            "_create_dsa_prefill_backend is missing",
        ),
    ],
)
def test_a_release_that_does_not_fit_is_declined_by_what_changed(change, said):
    skip_unless_captured()
    program = f"""
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.speculative import draft_utils, eagle_draft_extend_cuda_graph_runner as runner
{change}
{ACTIVATE}"""
    outcome = json.loads(last_line(run(program, json.dumps(SPARSE))))
    assert outcome["hooked"] == 0
    assert outcome["record"]["adapter"] is None
    assert said in outcome["record"]["reason"]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (TESTED[-1], None),
        (f"{TESTED[-1]}+cu130", None),
        (f"{TESTED[-1]}0", f"is newer than any tested release ({TESTED[-1]})"),
        ("1.0.0rc1", f"is newer than any tested release ({TESTED[-1]})"),
        ("0.5.12", "is not a tested release"),
    ],
)
def test_an_untested_release_that_fits_is_served_with_one_warning(version, said):
    done = run(f"import sglang\nsglang.__version__ = {version!r}\n{ACTIVATE}", json.dumps(SPARSE))
    assert json.loads(last_line(done))["record"]["adapter"] in ("in-graph", "eager")
    warnings = [line for line in done.stdout.splitlines() if "tested release" in line]
    advice = "compare its fill with SGLang's own by starting with --nsa-metadata-check 1"
    expected = (
        f"sglang-nsa-plugin: SGLang {version} {said}: everything that the plugin uses is there; {advice}"
    )
    assert warnings == ([] if said is None else [expected])
