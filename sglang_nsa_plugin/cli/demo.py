"""``sglang-nsa-plugin demo``: the plugin fills SGLang's real backend; every value is compared."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sglang_nsa_plugin.cli import environment, terminal

BATCH_SIZES = (1, 2, 4, 8, 16)
DRAFT_TOKENS = 4


def run(steps: int, seed: int, json_path: str | None) -> int:
    """Prints the facts, a table and the verdict; returns 0 when every value is equal."""
    console = terminal.console()
    with terminal.progress(console) as progress:
        result = _load_and_compare(steps, seed, progress)
    _print(console, result)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
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

    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.adapters.install import adapter_for_installed
    from sglang_nsa_plugin.harness.diff import Diff
    from sglang_nsa_plugin.harness.installed import pair_for_installed
    from sglang_nsa_plugin.state import record

    pair = pair_for_installed(device, BATCH_SIZES, draft_tokens=DRAFT_TOKENS)
    diff = Diff()
    progress.update(task, description="draft-extend steps")
    for bs in progress.track(_random_batches(pair, steps, seed), total=steps, task_id=task):
        pair.step(bs, diff)
    state = record()
    by_plugin = state["replays"] + state["launches"]
    passed = diff.first is None and by_plugin == steps and not state["fallbacks"]
    return {
        "sglang": environment.sglang()["version"],
        "torch": environment.distribution("torch"),
        "transformers": environment.distribution("transformers"),
        "device": _device_name(device),
        "cuda_graphs": device.type == "cuda" and bool(state["captures"]),
        "hook_targets": hooks.applied(adapter_for_installed().common.hooks),
        "state": state,
        "steps": steps,
        "seed": seed,
        "compared": dict(diff.compared),
        "different": dict(diff.different),
        "first_difference": diff.first,
        "verdict": "equal" if passed else "different",
    }


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
    longest = pair.inputs.req_to_token.shape[1]
    for _ in range(steps):
        raw_bs = int(torch.randint(1, pair.batch_sizes[-1] + 1, (), generator=rng))
        bs = pair.bucket(raw_bs)
        random_step(pair.inputs, rng, raw_bs, bs, DRAFT_TOKENS, longest)
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
    table.add_column("tensor")
    table.add_column("values compared", justify="right")
    table.add_column("different", justify="right")
    for name, count in result["compared"].items():
        table.add_row(name, f"{count:,}", f"{result['different'][name]:,}")
    return table


def _verdict(result: dict[str, Any]) -> str:
    total = sum(result["compared"].values())
    if result["verdict"] == "equal":
        return f"EQUAL: all {total:,} values of {result['steps']:,} steps"
    state = result["state"]
    different = sum(result["different"].values())
    return (
        f"DIFFERENT: {different:,} of {total:,} values, the first: {result['first_difference']}; the "
        f"plugin filled {state['replays'] + state['launches']} of {result['steps']} steps, fallbacks: "
        f"{state['fallbacks']}"
    )
