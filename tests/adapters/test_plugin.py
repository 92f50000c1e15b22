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
    ("plugins", "found"),
    [
        ("nsa", True),
        ("other, nsa", True),
        ("nas", False),
        ("other", False),
        ("", True),
        (" ", False),
    ],
)
def test_sglang_plugins_selects_by_name(plugins, found):
    """A list of blanks is a list without names to SGLang; an empty variable is no list."""
    logged = "import logging, sys\nlogging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
    done = run(f"{logged}{LOAD}print(bool(HookRegistry._patched))", SGLANG_PLUGINS=plugins)
    assert last_line(done) == str(found)
    assert ("Skipping plugin nsa (not in SGLANG_PLUGINS)" in done.stdout) == (not found)


def test_scheduler_is_hooked_where_it_is_loaded():
    program = (
        "import sglang.srt.managers.scheduler\n"
        + LOAD
        + "print(json.dumps(sorted(t.rsplit('.', 1)[1] for t in HookRegistry._patched)))"
    )
    assert json.loads(last_line(run(program))) == [
        "__init__",
        "add_cli_args",
        "from_cli_args",
        "get_internal_state",
    ]


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
    assert "invalid choice: 'cudaa'" in done.stderr
    for choice in ("auto", "cuda", "triton", "torch", "off"):
        assert choice in done.stderr.rsplit("invalid choice", 1)[1]


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
            "no speculative decoding, so there is no draft-extend metadata",
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
    assert f"not used: {reason}; SGLang fills draft-extend metadata itself" in lines[0]


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
            "lambda self, max_bs, max_num_tokens, device=None: None",
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
            "__init__ sets no attribute draft_extend_attn_backend, model_runner",
        ),
        (
            "runner.EAGLEDraftExtendCudaGraphRunner.execute = lambda self, forward_batch, rows: None",
            "execute takes (self, forward_batch, rows), "
            "expected (self, forward_batch, select_index) or (self, forward_batch)",
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
    expected = f"sglang-nsa-plugin: SGLang {version} {said}: everything the plugin uses fits; {advice}"
    assert warnings == ([] if said is None else [expected])
