"""``sglang-nsa-plugin demo``: SGLang's real backend, filled by the plugin, compared value by value."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BATCH_SIZES = (1, 2, 4, 8, 16)
DRAFT_TOKENS = 4


def run(steps: int, seed: int, json_path: str | None) -> int:
    """Runs the demo, prints a table and a verdict; returns 0 when every value was equal."""
    console = Console()
    device = _device()
    result = _discover_and_compare(device, steps, seed, console)
    _print(console, result)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["verdict"] == "equal" else 1


def _device() -> Any:
    """The GPU, or the CPU with Triton's interpreter for SGLang's own kernels.

    The interpreter's switch is read when Triton is imported, which SGLang does.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def _discover_and_compare(device: Any, steps: int, seed: int, console: Console) -> dict[str, Any]:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_nsa_plugin.adapters import hooks
    from sglang_nsa_plugin.state import record

    load_plugins()
    discovered = "sglang.srt.server_args.ServerArgs.add_cli_args" in HookRegistry._patched
    if not discovered:
        raise SystemExit(
            "sglang-nsa-plugin demo: SGLang did not load the plugin; SGLANG_PLUGINS must be unset or "
            f"contain nsa, got {os.environ.get('SGLANG_PLUGINS')!r}"
        )
    from sglang_nsa_plugin.cli.replay import Comparison
    from sglang_nsa_plugin.cli.twins import make_twin

    twin = make_twin(device, BATCH_SIZES, draft_tokens=DRAFT_TOKENS)
    comparison = Comparison()
    _replay_random_batches(twin, comparison, steps, seed, console)
    state = record()
    ours = state["replays"] + state["launches"]
    passed = comparison.first is None and ours == steps and not state["fallbacks"]
    return {
        "sglang": version("sglang"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "device": _device_name(device),
        "cuda_graphs": device.type == "cuda" and bool(state["captures"]),
        "hook_targets": hooks.installed(),
        "state": state,
        "steps": steps,
        "seed": seed,
        "compared": dict(comparison.compared),
        "different": dict(comparison.different),
        "first_difference": comparison.first,
        "verdict": "equal" if passed else "different",
    }


def _replay_random_batches(twin: Any, comparison: Any, steps: int, seed: int, console: Console) -> None:
    import torch

    from sglang_nsa_plugin.cli.batches import random_step

    rng = torch.Generator().manual_seed(seed)
    longest = twin.inputs.req_to_token.shape[1]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for _ in progress.track(range(steps), description="draft-extend steps"):
            raw_bs = int(torch.randint(1, twin.batch_sizes[-1] + 1, (), generator=rng))
            bs = twin.bucket(raw_bs)
            random_step(twin.inputs, rng, raw_bs, bs, DRAFT_TOKENS, longest)
            twin.step(bs, comparison)


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _print(console: Console, result: dict[str, Any]) -> None:
    state = result["state"]
    ours = state["replays"] + state["launches"]
    table = Table(title="SGLang's draft-extend metadata, SGLang's own fill against the plugin's")
    table.add_column("tensor")
    table.add_column("values compared", justify="right")
    table.add_column("different", justify="right")
    for name, count in result["compared"].items():
        table.add_row(name, f"{count:,}", f"{result['different'][name]:,}")
    console.print(
        f"SGLang {result['sglang']}, torch {result['torch']}, {result['device']}, "
        f"plugin {state['version']} found by SGLang's load_plugins()"
    )
    console.print(
        f"adapter {state['adapter']}, implementation {state['backend']} ({state['reason']}), "
        f"{'CUDA graphs' if result['cuda_graphs'] else 'no CUDA graphs'}"
    )
    console.print(table)
    total = sum(result["compared"].values())
    if result["verdict"] == "equal":
        console.print(f"EQUAL: {total:,} values in {result['steps']:,} steps, none different")
    else:
        console.print(
            f"DIFFERENT: {sum(result['different'].values()):,} of {total:,} values; first: "
            f"{result['first_difference']}; ours {ours} of {result['steps']}, "
            f"fallbacks {state['fallbacks']}"
        )
