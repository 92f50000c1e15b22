"""The command ``sglang-nsa-plugin``: reads the arguments and runs one subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

# What a machine or a caller can cause: a kernel that cannot run (BackendUnavailableError,
# LibraryUnavailableError and torch's own are RuntimeErrors), something not installed, a file that cannot
# be written. Anything else is a defect, and its traceback is wanted.
EXPECTED = (RuntimeError, ImportError, OSError)
INTERRUPTED = 130  # as shells tell a program that Ctrl-C ended

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 0 only when everything was as it should be."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except EXPECTED as error:
        if arguments.debug:
            raise
        print(f"sglang-nsa-plugin {arguments.command}: {in_words(error)}", file=sys.stderr)
        return 1
    return code


def in_words(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        what = {"sglang": "SGLang"}.get(package, package)
        said = f"{what} is not installed in this Python: {error}"
    else:
        said = " ".join(str(error).split()) or type(error).__name__
    return f"{said} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-nsa-plugin",
        description="Draft-extend metadata for SGLang's NSA/DSA sparse attention.",
        epilog="example: sglang-nsa-plugin verify",
    )
    parser.add_argument("--version", action="version", version=version("sglang-nsa-plugin"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_verify(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


def _add_verify(commands: Commands) -> None:
    verify = _command(
        commands,
        "verify",
        help="say what would fill the metadata on this machine, in under 20 seconds",
        description="Says what is installed, whether SGLang would load the plugin and its adapter fits, "
        "fills once with each implementation, compares and times it, and ends with a verdict. Needs no "
        "model. Exit code 0 when nothing stands in the way of the best implementation for this machine: "
        "the CUDA kernel, or its CPU twin where there is no GPU to serve with.",
        epilog="example: sglang-nsa-plugin verify --json | jq -r .verdict",
    )
    verify.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the result as JSON; without FILE, print nothing else",
    )
    verify.set_defaults(run=_verify)


def _add_demo(commands: Commands) -> None:
    demo = _command(
        commands,
        "demo",
        help="fill SGLang's own draft-extend backend and compare every value with its own fill",
        description="Lets SGLang discover the plugin, drives its real backend class through random "
        "draft-extend steps, and compares every tensor with SGLang's own fill. Uses CUDA graphs and "
        "the CUDA kernel on a GPU, the compiled CPU twin elsewhere. Exit code 0 when all are equal.",
        epilog="example: sglang-nsa-plugin demo --steps 500 --seed 7",
    )
    demo.add_argument("--steps", type=_positive, default=400, help="random batches (default: 400)")
    demo.add_argument("--seed", type=int, default=0, help="of the random batches (default: 0)")
    demo.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    demo.set_defaults(run=_demo)


def _add_bench(commands: Commands) -> None:
    bench = _command(
        commands,
        "bench",
        help="time one fill in every way, SGLang's own and ours, in the same run",
        description="Fills the same tensors with SGLang's own path and kernel, with each implementation "
        "of the plugin, with its CUDA graph and with the Python fill of SGLang 0.5.9, over requests, "
        "contexts, widths and draft tokens. Compares all values, then times host and GPU in alternating "
        "rounds. Takes about three minutes. Without a GPU it times the CPU twin, which says nothing "
        "about a GPU.",
        epilog="example: sglang-nsa-plugin bench --quick --json bench.json",
    )
    bench.add_argument("--quick", action="store_true", help="few cases, in less than a minute")
    bench.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    bench.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw µs over requests, as PNG or SVG (needs sglang-nsa-plugin[bench])",
    )
    bench.set_defaults(run=_bench)


def _command(
    commands: Commands, name: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A subcommand, which takes --debug as well as the program before it."""
    command = commands.add_parser(name, help=help, description=description, epilog=epilog)
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return command


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _verify(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import verify

    return verify.run(arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import demo

    return demo.run(arguments.steps, arguments.seed, arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli.bench import run as bench

    return bench.run(arguments.json, arguments.plot, arguments.quick)
