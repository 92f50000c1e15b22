"""``sglang-nsa-plugin demo``: the plugin fills SGLang's real backend; every value is compared."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sglang_nsa_plugin.cli import environment, files, terminal

BATCH_SIZES = (1, 2, 4, 8, 16)
DRAFT_TOKENS = 4


def run(steps: int, seed: int, json_path: str | None) -> int:
    """Prints the facts, a table and the verdict; returns 0 when every value of every role is equal."""
    console = terminal.console()
    files.raise_if_unwritable(json_path)
    with terminal.progress(console) as progress:
        result = _load_and_compare(steps, seed, progress)
    files.write_and_show(result, json_path, lambda: _print(console, result))
    return 0 if result["verdict"] == "equal" else 1


def _device() -> Any:
    """The GPU, or the CPU with Triton's interpreter for SGLang's own kernels.

    Triton reads the interpreter's switch when it is imported, and importing SGLang imports Triton.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    os.environ["TRITON_INTERPRET"] = "1"
    # SGLang warns once for each of its parts that needs a GPU.
    warnings.filterwarnings("ignore", module=r"sglang\.")
    return torch.device("cpu")


def _load_and_compare(steps: int, seed: int, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("loading SGLang", total=None)
    device = _device()  # before SGLang is imported, and Triton with it
    _load_plugin()

    from sglang_nsa_plugin.state import ALL_ROLES, DRAFT_EXTEND, record

    roles, states = {}, {}
    for role in ALL_ROLES:
        progress.reset(task, description=f"{role} steps", total=steps)
        roles[role] = _compare(role, device, steps, seed, lambda: progress.advance(task))
        states[role] = record()["roles"][role]  # before another one is asked for instead
    state = {**record(), **states[DRAFT_EXTEND], "roles": states}
    filled = {role: part for role, part in roles.items() if "declined" not in part}
    firsts = [f"{role} {part['first_difference']}" for role, part in filled.items() if part["different"]]
    passed = not firsts and all(_is_by_plugin(states[role], steps) for role in filled)
    return {
        "sglang": environment.sglang()["version"],
        "torch": environment.distribution("torch"),
        "transformers": environment.distribution("transformers"),
        "device": _device_name(device),
        "cuda_graphs": device.type == "cuda" and bool(state["captures"]),
        "hook_targets": _hook_targets(filled),
        "state": state,
        "steps": steps * len(filled),
        "seed": seed,
        "roles": roles,
        "compared": _sum(part["compared"] for part in filled.values()),
        "different": _sum(part["different"] for part in filled.values()),
        "first_difference": firsts[0] if firsts else None,
        "verdict": "equal" if passed else "different",
    }


def _compare(
    role: str, device: Any, steps: int, seed: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """What was compared in this role; or why the plugin fills nothing of it with this SGLang."""
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.installed import pair_for_installed, why_declined
    from sglang_nsa_plugin.state import DRAFT_EXTEND

    # Draft-extend is filled with every release: where it is not, making its backend says why.
    why_not = None if role == DRAFT_EXTEND else why_declined(role)
    if why_not is not None:
        return {"declined": why_not}
    pair = pair_for_installed(device, BATCH_SIZES, role=role, draft_tokens=DRAFT_TOKENS)
    diff = Diff()
    for bs in _random_batches(pair, steps, seed):
        pair.step(bs, diff)
        advance()
    return {
        "steps": steps,
        "compared": dict(diff.compared),
        "different": {name: count for name, count in diff.different.items() if count},
        "first_difference": diff.first,
    }


def _is_by_plugin(state: dict[str, Any], steps: int) -> bool:
    return state["replays"] + state["launches"] == steps and not state["fallbacks"]


def _hook_targets(roles: Iterable[str]) -> list[str]:
    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.install import adapter_for_installed

    adapter = adapter_for_installed()
    of_roles = (hook for role in roles for hook in adapter.parts_of(role).hooks)
    return hooks.applied((*adapter.common.hooks, *of_roles))


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """By tensor, over roles."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _load_plugin() -> None:
    """Has SGLang's own loader load the plugin.

    Raises:
        RuntimeError: SGLang did not load it.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    if "sglang.srt.server_args.ServerArgs.add_cli_args" not in HookRegistry._patched:
        raise RuntimeError(
            "SGLang did not load the plugin: SGLANG_PLUGINS must be unset or contain nsa, got "
            f"{os.environ.get('SGLANG_PLUGINS')!r}"
        )


def _random_batches(pair: Any, steps: int, seed: int) -> Iterator[int]:
    """Writes one random batch after another into the pair's inputs and yields the graph's batch size."""
    import torch

    from sglang_nsa_plugin.harness.inputs import random_step

    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        raw_bs = int(torch.randint(1, pair.batch_sizes[-1] + 1, (), generator=rng))
        bs = pair.bucket(raw_bs)
        random_step(pair.inputs, rng, raw_bs, bs, DRAFT_TOKENS, pair.ours.longest)
        yield bs


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _print(console: Console, result: dict[str, Any]) -> None:
    state = result["state"]
    graphs = "CUDA graphs" if result["cuda_graphs"] else "no CUDA graphs"
    terminal.print_facts(
        console,
        [
            ("sglang-nsa-plugin", f"{state['version']}, loaded by SGLang's load_plugins()"),
            ("SGLang", f"{result['sglang']}, torch {result['torch']}"),
            ("device", f"{result['device']}, {graphs}"),
            ("adapter", state["adapter"]),
            ("implementation", f"{state['backend']}: {state['reason']}"),
        ],
    )
    console.print()
    console.print(_comparison_table(result))
    console.print()
    terminal.print_verdict(console, _verdict(result), result["verdict"] == "equal")


def _comparison_table(result: dict[str, Any]) -> Table:
    table = Table(title="the plugin's fill compared with SGLang's own", title_justify="left")
    table.add_column("role")
    table.add_column("tensor")
    table.add_column("values compared", justify="right")
    table.add_column("different", justify="right")
    for role, part in result["roles"].items():
        if "declined" in part:
            table.add_row(role, f"declined: {part['declined']}", "-", "-", end_section=True)
            continue
        *_, last = part["compared"]
        for name, count in part["compared"].items():
            different = part["different"].get(name, 0)
            table.add_row(role, name, f"{count:,}", f"{different:,}", end_section=name == last)
            role = ""  # named in its first row
    return table


def _verdict(result: dict[str, Any]) -> str:
    total = sum(result["compared"].values())
    filled = [role for role, part in result["roles"].items() if "declined" not in part]
    if result["verdict"] == "equal":
        return f"EQUAL: all {total:,} values of {result['steps']:,} steps ({', '.join(filled)})"
    different = sum(result["different"].values())
    by_role = "; ".join(_filled(role, result["state"]["roles"][role]) for role in filled)
    return (
        f"DIFFERENT: {different:,} of {total:,} values, the first: {result['first_difference']}; the "
        f"plugin filled of {result['steps']:,} steps: {by_role}"
    )


def _filled(role: str, state: dict[str, Any]) -> str:
    return f"{role} {state['replays'] + state['launches']}, fallbacks {state['fallbacks']}"
