"""Another plugin beside this one, found before it or after it by SGLang's own loader.

It applies hooks in its own ``register()``, so SGLang skips hooks that come later on the same target.
"""

from __future__ import annotations

import pytest
from stand_in_server import MAKE_BACKEND, other_plugin, start

SCHEDULER = "sglang.srt.managers.scheduler"
INIT = f"{SCHEDULER}.Scheduler.__init__"
ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = "sglang.srt.server_args.ServerArgs.from_cli_args"
BESIDE_THE_FILL = (
    ADD_CLI_ARGS,
    FROM_CLI_ARGS,
    f"{SCHEDULER}.configure_scheduler_process",
    f"{SCHEDULER}.Scheduler.get_init_info",
    f"{SCHEDULER}.Scheduler.get_internal_state",
)
EVERY = (INIT, *BESIDE_THE_FILL)
MADE = "print('made')"


@pytest.fixture
def other(tmp_path):
    """Makes the other plugin, which hooks these targets, in a folder of its own."""
    folder = tmp_path / "other"
    folder.mkdir()
    return lambda *targets: (other_plugin(folder, *targets),)


def skipped(started) -> list[str]:
    """The lines on hooks that do not run, as launcher and scheduler say them."""
    lines = started.lines("so the plugin's hook there does not run")
    return sorted({line[line.index("sglang-nsa-plugin: ") :] for line in lines})


def test_without_another_plugin_the_fill_is_in_place(tmp_path):
    started = start(tmp_path, change=MAKE_BACKEND)
    assert started.returncode == 0, started.log
    assert started.is_ready
    assert started.record["in_place"] == {"draft-extend": True}
    assert skipped(started) == []
    (line,) = started.lines("is in place")
    assert "draft-extend is in place: adapter " in line
    assert "implementation torch" in line


def test_auto_serves_and_says_which_plugin_patched_the_constructor_first(tmp_path, other):
    started = start(tmp_path, first=other(INIT), change=MADE)
    assert started.returncode == 0, started.log
    assert started.is_ready
    reason = started.record["reason"]
    assert reason.startswith(f"another plugin (other) patched {INIT} before. It called HookRegistry")
    assert started.record["in_place"] == {"draft-extend": False}
    (line,) = started.lines("not used: ")
    assert reason in line
    assert len(skipped(started)) == 1


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_backend_by_name_ends_before_a_model_is_loaded(tmp_path, other, by):
    flags = ("--nsa-metadata-backend", "torch") if by == "flag" else ()
    environment = {"SGLANG_NSA_METADATA_BACKEND": "torch"} if by == "variable" else {}
    started = start(tmp_path, *flags, first=other(INIT), change=MADE, **environment)
    assert started.returncode != 0
    assert started.lines("made") == []
    (line,) = started.lines("BackendUnavailableError: ")
    assert "torch was asked for by name and cannot be used: another plugin (other) patched" in line


def test_a_backend_by_name_ends_the_start_where_only_get_init_info_is_left(tmp_path, other):
    first = other(INIT, f"{SCHEDULER}.configure_scheduler_process", FROM_CLI_ARGS)
    started = start(tmp_path, "--nsa-metadata-backend", "torch", first=first, change=MADE)
    assert started.returncode != 0
    assert not started.is_ready
    assert started.lines("torch was asked for by name and cannot be used: ")


@pytest.mark.parametrize("target", BESIDE_THE_FILL)
def test_a_hook_beside_the_fill_that_is_skipped_is_named_and_the_fill_is_in_place(
    tmp_path, other, target
):
    started = start(tmp_path, first=other(target), change=MAKE_BACKEND)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": True}
    (line,) = skipped(started)
    assert line.startswith(f"sglang-nsa-plugin: another plugin (other) patched {target} before")


@pytest.mark.parametrize("target", EVERY)
def test_a_plugin_that_is_found_later_leaves_everything_in_place(tmp_path, other, target):
    started = start(tmp_path, last=other(target), change=MAKE_BACKEND)
    assert started.returncode == 0, started.log
    assert started.record["in_place"] == {"draft-extend": True}
    assert skipped(started) == []


def test_a_backend_by_name_runs_where_from_cli_args_is_not_the_plugins(tmp_path, other):
    flags = ("--nsa-metadata-backend", "torch")
    started = start(tmp_path, *flags, first=other(FROM_CLI_ARGS), change=MAKE_BACKEND)
    assert started.record["in_place"] == {"draft-extend": True}
    started = start(tmp_path, *flags, first=(str(tmp_path / "other"),), change=MADE)
    assert started.returncode != 0
    assert started.lines("torch was asked for by name and cannot be used: SGLang made no NSA/DSA")


@pytest.mark.parametrize(
    ("by", "target"),
    [
        *(("variable", target) for target in EVERY),
        # without the hook of add_cli_args there is no flag, see below
        *(("flag", target) for target in EVERY if target != ADD_CLI_ARGS),
    ],
)
def test_off_holds_whatever_another_plugin_patched(tmp_path, other, by, target):
    flags = ("--nsa-metadata-backend", "off") if by == "flag" else ()
    environment = {"SGLANG_NSA_METADATA_BACKEND": "off"} if by == "variable" else {}
    started = start(tmp_path, *flags, first=other(target), change=MADE, **environment)
    assert started.returncode == 0, started.log
    assert started.record["reason"] == "switched off"
    assert started.record["adapter"] is None
    assert started.lines("not used: switched off")


def test_a_flag_that_another_plugin_kept_out_ends_the_start_below_a_line_that_says_why(tmp_path, other):
    started = start(tmp_path, "--nsa-metadata-backend", "off", first=other(ADD_CLI_ARGS))
    assert started.returncode == 2
    assert started.lines("unrecognized arguments: --nsa-metadata-backend off")
    (line,) = skipped(started)
    assert f"another plugin (other) patched {ADD_CLI_ARGS} before" in line


def test_the_flag_wins_over_the_variable_where_from_cli_args_is_not_the_plugins(tmp_path, other):
    started = start(
        tmp_path,
        "--nsa-metadata-backend=auto",
        first=other(FROM_CLI_ARGS),
        change=MADE,
        SGLANG_NSA_METADATA_BACKEND="off",
    )
    assert started.record["reason"].startswith("SGLang made no NSA/DSA attention backend")
