"""SGLang's own classes, changed as a later release may change them.

A function is written anew from its source, so all that is not changed is the installed release's. To be
called before the plugin is activated, in a process of its own.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from cpu_pair import (
    BATCH_SIZES,
    CPU,
    DRAFT_TOKENS,
    expect_equal_after_sglang_fill,
    make_pair,
    random_batch,
)

from sglang_nsa_plugin.adapters import taken_over
from sglang_nsa_plugin.harness import process_stubs
from sglang_nsa_plugin.harness.graph_backend import GraphBackend
from sglang_nsa_plugin.state import ROLES, STATES

REPLAYS = 6
TABLE = "decode_cuda_graph_metadata"


def rewrite(target: str, change: Callable[[ast.FunctionDef], object]) -> None:
    """Puts the function at a dotted path through a change of its syntax tree."""
    owner_path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    setattr(owner, name, rewritten(getattr(owner, name), change))


def rewritten(function: Callable[..., Any], change: Callable[[ast.FunctionDef], object]) -> Any:
    function = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    change(definition)
    flags = __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(tree), function.__qualname__, "exec", flags)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    return made[definition.name]


# --- parameters ---


def optional_parameter(definition: ast.FunctionDef) -> None:
    definition.args.args.append(ast.arg("later"))
    definition.args.defaults.append(ast.Constant(None))


def required_parameter(definition: ast.FunctionDef) -> None:
    definition.args.kwonlyargs.append(ast.arg("later"))
    definition.args.kw_defaults.append(None)


def renamed_parameter(definition: ast.FunctionDef, name: str) -> None:
    arguments = definition.args
    for each in (*arguments.args, *arguments.kwonlyargs):
        each.arg += "_renamed" * (each.arg == name)


def removed_parameter(definition: ast.FunctionDef, name: str) -> None:
    arguments = definition.args
    arguments.args = [each for each in arguments.args if each.arg != name]
    arguments.defaults = arguments.defaults[-len(arguments.args) :]
    arguments.kwonlyargs = [each for each in arguments.kwonlyargs if each.arg != name]
    arguments.kw_defaults = arguments.kw_defaults[: len(arguments.kwonlyargs)]


def parameters_by_name(definition: ast.FunctionDef) -> None:
    """All but self can be passed by name alone."""
    arguments = definition.args
    arguments.kwonlyargs, arguments.args = arguments.args[1:], arguments.args[:1]
    missing = [None] * (len(arguments.kwonlyargs) - len(arguments.defaults))
    arguments.kw_defaults, arguments.defaults = [*missing, *arguments.defaults], []


def reordered_parameters(definition: ast.FunctionDef) -> None:
    definition.args.args[1:] = reversed(definition.args.args[1:])


# --- fields of the metadata ---


def add_field(value: Callable[[], Any]) -> None:
    """A new field of DSAMetadata with this default."""
    from sglang.srt.layers.attention import dsa_backend

    old = dsa_backend.DSAMetadata
    field = ("later", Any, dataclasses.field(default_factory=value))
    frozen = old.__dataclass_params__.frozen
    new = dataclasses.make_dataclass(old.__name__, [field], bases=(old,), frozen=frozen)
    for module in list(sys.modules.values()):
        if vars(module).get("DSAMetadata") is old:
            module.DSAMetadata = new  # type: ignore[attr-defined]


# --- the table of what was captured ---


def key_table_by(key: str) -> None:
    """Everywhere that SGLang keeps metadata under a batch size, this key takes its place.

    It is an expression of ``bs`` and ``mode``.
    """
    from sglang.srt.layers.attention import dsa_backend

    for owner in (
        *dsa_backend.DeepseekSparseAttnBackend.__mro__,
        dsa_backend.DeepseekSparseAttnMultiStepBackend,
    ):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function) and TABLE in function.__code__.co_names:
                function.__globals__["ForwardMode"] = dsa_backend.ForwardMode
                setattr(owner, name, rewritten(function, lambda made: _Keys(made, key).visit(made)))


class _Keys(ast.NodeTransformer):
    """Where a function knows no mode, it is one of draft-decode."""

    def __init__(self, definition: ast.FunctionDef, key: str) -> None:
        has_mode = "forward_mode" in [each.arg for each in definition.args.args]
        mode = "forward_mode" if has_mode else "ForwardMode.DECODE"
        self._key = f"(lambda bs, mode: {key})(bs, {mode})"

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if _is_table(node.value) and _is_bs(node.slice):
            node.slice = self._made()
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if _is_table(node.comparators[0]) and _is_bs(node.left):
            node.left = self._made()
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and _is_table(node.func.value) and _is_bs(node.args[0]):
            node.args[0] = self._made()
        return node

    def _made(self) -> ast.expr:
        return ast.parse(self._key, mode="eval").body


def _is_table(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == TABLE


def _is_bs(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "bs"


# --- the runner of draft-extend, staged before verify ---

RUNNER = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"


def stage_draft_extend() -> None:
    """``execute`` takes ``staged``, with which the metadata was planned before, and another method
    notes the batch size.
    """
    rewrite(f"{RUNNER}.execute", _staged)
    pkgutil.resolve_name(RUNNER)._note_size = _note_size


def _note_size(runner: Any, bs: int) -> None:
    runner.bs = bs


def _staged(definition: ast.FunctionDef) -> None:
    definition.args.args.append(ast.arg("staged"))
    definition.args.defaults.append(ast.Constant(False))
    _Staged().visit(definition)


class _Staged(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        if getattr(called, "attr", None) != "init_forward_metadata_out_graph":
            return node
        return ast.If(ast.parse("not staged", mode="eval").body, [node], [])

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        is_size = ast.unparse(node.targets[0]) == "self.bs"
        return ast.parse(f"self._note_size({ast.unparse(node.value)})").body[0] if is_size else node


# --- a plugin around it ---


def serve_without_values() -> dict[str, tuple[int, int, int, str]]:
    """The same without replays, for what the harness itself cannot replay."""
    found = {}
    for role in ROLES:
        state = STATES[role]
        process_stubs.activate_plugin("auto", 0, role)
        ours = GraphBackend(CPU, role=role, draft_tokens=DRAFT_TOKENS)
        ours.init_state()
        for bs in BATCH_SIZES:
            ours.capture_setup(bs)
            ours.backend.init_forward_metadata_in_graph(ours.capture_batch(bs))
        found[role] = (state.replays, 0, 0, state.reason)
    return found


def serve(check_every: int = 0) -> dict[str, tuple[int, int, int, str]]:
    """Replays of each role of a speculative step: by the plugin, by SGLang, mismatches, the reason.

    Raises:
        AssertionError: a value differs from SGLang's own fill.
    """
    found = {}
    for role in ROLES:
        state = STATES[role]
        pair = make_pair(role=role, check_every=check_every)
        generator = torch.Generator().manual_seed(1)
        for _ in range(REPLAYS):
            bs = random_batch(pair, generator)
            if hasattr(pair.ours.backend, taken_over.ATTRIBUTE):
                pair.replay(bs)
            else:
                pair.ours.replay(bs)
                pair.replay_graph(bs)
            expect_equal_after_sglang_fill(pair, bs)
        sglangs = sum(state.fallbacks.values())
        found[role] = (state.replays, sglangs, state.mismatches, state.reason)
    return found
