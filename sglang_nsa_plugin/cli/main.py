"""The command ``sglang-nsa-plugin``: reads the arguments and runs one subcommand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 0 only when everything was as it should be."""
    parser = argparse.ArgumentParser(
        prog="sglang-nsa-plugin",
        description="Draft-extend metadata for SGLang's NSA/DSA sparse attention.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_bench(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="fill SGLang's own draft-extend backend and compare every value with its own fill",
        description="Lets SGLang discover the plugin, drives its real backend class through random "
        "draft-extend steps, and compares every tensor with SGLang's own fill. Uses CUDA graphs and "
        "the CUDA kernel on a GPU, the compiled CPU twin elsewhere.",
        epilog="example: sglang-nsa-plugin demo --steps 500 --seed 7",
    )
    demo.add_argument("--steps", type=int, default=400, help="random batches (default: 400)")
    demo.add_argument("--seed", type=int, default=0, help="of the random batches (default: 0)")
    demo.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    demo.set_defaults(run=_demo)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="time one fill, SGLang's own and ours, in the same run (needs a GPU)",
        description="Host time before a draft-extend replay and GPU time of the fill, SGLang's own and "
        "the plugin's, on the same tensors in the same run.",
        epilog="example: sglang-nsa-plugin bench --json bench.json",
    )
    bench.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    bench.set_defaults(run=_bench)


def _demo(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import demo

    return demo.run(arguments.steps, arguments.seed, arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import bench

    return bench.run(arguments.json)
