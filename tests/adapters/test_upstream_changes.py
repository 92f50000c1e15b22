"""What a later SGLang may change, and what then becomes of the plugin.

Where what it uses is untouched the plugin fills, and every value equals SGLang's; where it is not, it
steps aside with the reason. The classes are the installed release's own, changed by changed_sglang.py.
The changes are those that were under way when 0.5.23 was the newest release: SGLang's pull requests
31824, 32010, 32885, 35126 and 35289.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import pkgutil
from pathlib import Path

import pytest
from changed_sglang import (
    REPLAYS,
    RUNNER,
    parameters_by_name,
    removed_parameter,
    renamed_parameter,
    reordered_parameters,
    required_parameter,
    rewritten,
)
from cpu_pair import on_the_cpu
from isolated import run

from sglang_nsa_plugin.adapters import draft_decode, hooks, in_graph, tree_mask
from sglang_nsa_plugin.adapters.hooks import Call, Fields, Hook
from sglang_nsa_plugin.state import DRAFT_DECODE, DRAFT_EXTEND, ROLES, VERIFY

pytestmark = on_the_cpu

PARTS = (in_graph.ADAPTER.common, *in_graph.ADAPTER.parts.values())
MASK = [] if hooks.misfits([tree_mask.HOOK]) else [tree_mask.HOOK]  # 0.5.15 makes the mask elsewhere
TABLE = (*(row for parts in PARTS for row in parts.requirements), *MASK)
ROWS = {row.target: row for row in TABLE if isinstance(row, (Hook, Call))}
FIELDS = {f"{row.target}.{name}": row for row in TABLE if isinstance(row, Fields) for name in row.names}
PROGRAM = """
import json
import changed_sglang
from changed_sglang import *
{change}
print(json.dumps({serve}))
"""
SERVED = [REPLAYS, 0, 0]  # filled by the plugin, by SGLang, mismatches


def serve_changed(change: str, serve: str = "serve()") -> dict[str, list]:
    """What becomes of each role with SGLang changed in this way."""
    done = run(PROGRAM.format(change=change, serve=serve))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def expect_served(found: dict[str, list], *roles: str) -> None:
    assert {role: found[role][:3] for role in roles} == dict.fromkeys(roles, SERVED), found


def expect_left_to_sglang(found: dict[str, list], role: str, why: str) -> None:
    assert found[role][:3] == [0, 0, 0], found
    assert why in found[role][3], found


# --- parameters: 35126, 35289 ---

OPTIONAL = """
from sglang_nsa_plugin.adapters import hooks, in_graph
for parts in (in_graph.ADAPTER.common, *in_graph.ADAPTER.parts.values()):
    for row in parts.requirements:
        if isinstance(row, (hooks.Hook, hooks.Call)) and not row.target.endswith("__init__"):
            rewrite(row.target, optional_parameter)
"""


def test_optional_parameters_everywhere_change_nothing():
    expect_served(serve_changed(OPTIONAL, "serve(check_every=1)"), *ROLES)


GIVEN = f"""
{OPTIONAL}
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
def replay(harness, bs):
    with harness.stub_process():
        harness.backend.init_forward_metadata_out_graph(harness.replay_view(bs), later=1)
GraphBackend.replay = replay
"""


def test_a_replay_with_an_argument_that_is_new_is_sglangs():
    """It may mean another plan. What the graph fills is switched off, as for any other fallback."""
    found = serve_changed(GIVEN)
    assert {role: each[:3] for role, each in found.items()} == {role: [0, REPLAYS, 0] for role in ROLES}


RECORDED_WITH = """
from sglang_nsa_plugin.adapters import taken_over
from sglang.srt.layers.attention import dsa_backend
for owner in (dsa_backend.DeepseekSparseAttnBackend, dsa_backend.DeepseekSparseAttnMultiStepBackend):
    seen = []
    owner.init_forward_metadata_in_graph = lambda self, forward_batch, later=None: seen.append(later)
from sglang_nsa_plugin.harness.graph_pair import GraphPair
def capture(pair, bs):
    batch = pair.ours.capture_batch(bs)
    record = lambda: pair.ours.backend.init_forward_metadata_in_graph(batch, later=2)
    record()
    return record
GraphPair._capture = capture
"""


def test_an_argument_that_is_new_at_capture_reaches_sglang():
    found = serve_changed(RECORDED_WITH, "[serve(), sorted(set(seen))]")
    assert found[1] == [2]
    expect_served(found[0], *ROLES)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("change", ["required", "renamed", "removed", "reordered"])
def test_a_parameter_that_changed_is_named(change, target, monkeypatch):
    row = ROWS[target]
    *_, name = row.parameters
    if change == "required":
        if isinstance(row, Hook) and row.and_more:
            pytest.skip("its hook hands everything through")
        made = required_parameter
    elif len(row.parameters) < 1 + (change == "reordered") + (name == "self") * 2:
        pytest.skip("it has no parameters but self")
    elif change == "reordered":
        made = reordered_parameters
    else:
        of_name = {"renamed": renamed_parameter, "removed": removed_parameter}[change]
        made = functools.partial(of_name, name=name)
    changed = rewritten(pkgutil.resolve_name(target), made)
    if change == "reordered" and changed.__code__.co_argcount < 3:
        pytest.skip("it has one positional parameter but self")
    monkeypatch.setattr(target, changed)
    (why,) = hooks.misfits([row])
    assert why.startswith(f"{target} takes (")


@pytest.mark.parametrize(
    "method", [draft_decode._out_graph, in_graph._out_graph, in_graph._init_backend]
)
def test_a_parameter_by_name_alone_that_a_hook_hands_by_position_is_named(method, monkeypatch):
    (row,) = (row for row in ROWS.values() if isinstance(row, Hook) and row.replacement is method)
    changed = rewritten(pkgutil.resolve_name(row.target), parameters_by_name)
    monkeypatch.setattr(row.target, changed)
    (why,) = hooks.misfits([row])
    assert why.startswith(f"{row.target} takes ")
    assert why.endswith("by name alone, expected by position")


def test_what_the_plugin_calls_may_take_its_parameters_by_name_alone():
    called = {row.target.rpartition(".")[2] for row in ROWS.values() if isinstance(row, Call)}
    by_position = [
        f"{path.name}:{node.lineno}: {node.func.attr}"
        for path in Path(in_graph.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in called and node.args
    ]
    assert by_position == []


# --- the staging of draft-extend before verify: 35126, 35289 ---

STAGED = """
from unittest import mock

import test_runner
from test_runner import make_runner
from sglang_nsa_plugin.harness.diff import Diff
from sglang_nsa_plugin.harness.inputs import random_step
from sglang_nsa_plugin.state import STATE

def serve_staged():
    pair = make_pair()
    for captured in pair.fills().captured.values():
        captured.read_done = mock.Mock()
    runner = make_runner(pair)
    verify = make_pair(role="verify")
    generator = torch.Generator().manual_seed(1)
    for bs in (1, 2, 4, 8) * 3:
        width = pair.inputs.req_to_token.shape[1]
        random_step(pair.inputs, generator, bs, bs, 4, width)
        pair.ours.replay(bs)  # staged
        verify.replay(random_batch(verify, generator))
        batch = test_runner.Batch(
            batch_size=bs,
            input_ids=torch.zeros(bs * 4, dtype=torch.int64),
            positions=torch.zeros(bs * 4, dtype=torch.int64),
            out_cache_loc=torch.zeros(bs * 4, dtype=torch.int64),
            seq_lens=pair.inputs.seq_lens[:bs].clone(),
            req_pool_indices=pair.inputs.req_pool_indices[:bs].clone(),
            spec_info=test_runner.Batch(),
        )
        more = [torch.arange(bs) * 4] if "select_index" in parameters_of_execute() else []
        with pair.stub_process():
            runner.execute(batch, *more, staged=True)
        expect_equal_after_sglang_fill(pair, bs)
        waited_on = test_runner.wait_of_the_scheduler(runner.model_runner)
        assert waited_on is pair.captured(bs).read_done
    return [STATE.replays, sum(STATE.fallbacks.values())]

def parameters_of_execute():
    return inspect.signature(pkgutil.resolve_name(RUNNER).execute).parameters
"""


def test_draft_extend_that_is_planned_before_verify_is_served():
    assert serve_changed(f"stage_draft_extend()\n{STAGED}", "serve_staged()") == [12, 0]


def test_a_runner_that_notes_no_batch_size_is_named(monkeypatch):
    monkeypatch.setattr(f"{RUNNER}.execute", lambda self, forward_batch: None)
    assert hooks.misfits(TABLE) == [f"{RUNNER} sets no attribute bs"]


# --- fields of the metadata ---


@pytest.mark.parametrize("default", ["None", "7"])
def test_a_new_field_with_a_default_changes_nothing(default):
    expect_served(serve_changed(f"add_field(lambda: {default})", "serve(check_every=1)"), *ROLES)


def test_a_new_field_that_holds_a_tensor_is_not_left_as_it_was_captured():
    found = serve_changed("add_field(lambda: torch.zeros(4))")
    for role in ROLES:
        expect_left_to_sglang(found, role, "later: DSAMetadata has tensors here that")


def test_a_field_of_another_type_is_not_filled():
    """Lengths of int64, as an example: what the plugin writes would be read as something else."""
    change = """
def longer(function):
    def build(self, *args, **kwargs):
        function(self, *args, **kwargs)
        metadata = self.forward_metadata
        object.__setattr__(metadata, "dsa_cache_seqlens_int32", metadata.dsa_cache_seqlens_int32.long())
    return build

from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend as Backend
(name,) = (name for name, member in vars(Backend).items() if name.startswith("_build_forward_metadata"))
setattr(Backend, name, longer(getattr(Backend, name)))
"""
    found = serve_changed(change)
    for role in ROLES:
        expect_left_to_sglang(found, role, "nsa_cache_seqlens: dtype must be int32, got int64")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_was_renamed_is_named(field, monkeypatch):
    row, (target, _, name) = FIELDS[field], field.rpartition(".")
    fields = {**pkgutil.resolve_name(target).__dataclass_fields__}
    renamed = copy.copy(fields.pop(name))
    renamed.name = f"{name}_renamed"
    fields[renamed.name] = renamed
    monkeypatch.setattr(f"{target}.__dataclass_fields__", fields)
    assert hooks.misfits([row]) == [f"{target} has no field {name}"]


# --- the table of what was captured ---

BY_MODE = "(bs, ForwardMode.DRAFT_EXTEND_V2) if mode.is_draft_extend_v2() else bs"


@pytest.mark.parametrize("key", ["(bs, mode)", BY_MODE])
def test_a_table_by_batch_size_and_mode_is_read(key):
    expect_served(serve_changed(f"key_table_by({key!r})", "serve(check_every=1)"), *ROLES)


def test_a_table_by_anything_else_is_not_guessed_at():
    found = serve_changed("key_table_by('(mode.name, bs)')", "serve_without_values()")
    for role in ROLES:
        expect_left_to_sglang(found, role, "decode_cuda_graph_metadata: must have the batch size")


# --- SGLang's own fill in the graph: 32010, 32885 ---

OWN_FILL = """
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend as Backend
def fill(self, forward_batch):
    if {asks}:
        return
    bs = forward_batch.batch_size
    lengths = forward_batch.seq_lens[:bs].clone()
    if forward_batch.forward_mode.is_target_verify():
        lengths += self.speculative_num_draft_tokens
    self.decode_cuda_graph_metadata[bs].cache_seqlens_int32.copy_(lengths)
Backend.init_forward_metadata_in_graph = fill
"""


def test_a_role_that_sglang_fills_in_the_graph_is_sglangs_and_no_other():
    found = serve_changed(OWN_FILL.format(asks="not forward_batch.forward_mode.is_target_verify()"))
    expect_left_to_sglang(found, VERIFY, "DeepseekSparseAttnBackend fills verify in the graph itself")
    expect_served(found, DRAFT_EXTEND, DRAFT_DECODE)


def test_a_fill_in_the_graph_for_other_batches_changes_nothing():
    """Ragged verify, which none of the algorithms has that the plugin fills verify for."""
    ragged = "getattr(forward_batch.spec_info, 'ragged_verify_layout', None) is None"
    expect_served(serve_changed(OWN_FILL.format(asks=ragged)), *ROLES)


def test_a_fill_in_the_graph_of_every_mode_leaves_every_role_to_sglang():
    found = serve_changed(OWN_FILL.format(asks="False"))
    for role in ROLES:
        expect_left_to_sglang(found, role, f"fills {role} in the graph itself")


OTHERS_FILL = """
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
seen = []
def fill(self, forward_batch):
    if getattr(self, "fills_in_graph", False):
        self.refill(forward_batch)
    seen.append(forward_batch.forward_mode.name)
AttentionBackend.init_forward_metadata_in_graph = fill
"""


def test_a_fill_in_the_graph_of_other_backends_changes_nothing():
    """And what SGLang's method does besides is still recorded."""
    found = serve_changed(OTHERS_FILL, "[serve(), sorted(set(seen))]")
    assert found[1] == ["DECODE", "DRAFT_EXTEND_V2", "TARGET_VERIFY"]
    expect_served(found[0], *ROLES)


# --- the prolog of draft-extend in one launch: 31824 ---

PROLOG = """
class Prolog(ast.NodeTransformer):
    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "torch.full":
            node.func = ast.parse("self._prolog", mode="eval").body
        return node

from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend as Backend
Backend._prolog = lambda self, *args, **kwargs: torch.full(*args, **kwargs)
for name in ("_apply_cuda_graph_metadata",):
    setattr(Backend, name, rewritten(getattr(Backend, name), lambda made: Prolog().visit(made)))
"""


def test_another_way_to_sglangs_own_fill_changes_nothing():
    expect_served(serve_changed(PROLOG, "serve(check_every=1)"), *ROLES)
