"""The command ``sglang-nsa-plugin``: reads the arguments and runs one subcommand."""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from sglang_nsa_plugin.cli import environment
from sglang_nsa_plugin.cli.ab.compare import FEWEST_ROUNDS

# Errors that the machine or the caller can cause: a kernel that cannot run (BackendUnavailableError,
# LibraryUnavailableError and torch's own errors are RuntimeErrors), a package that is not installed, a
# broken checkout of SGLang, a file that cannot be written. Any other error is a defect and keeps its
# traceback.
EXPECTED = (RuntimeError, ImportError, SyntaxError, OSError)
MOST = 1_000_000  # of what is counted
INTERRUPTED = 130  # the exit code by which shells recognise Ctrl-C

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 for success only."""
    _print_in_any_encoding()
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except EXPECTED as error:
        if arguments.debug:
            raise
        print(f"sglang-nsa-plugin {arguments.command}: {one_line(error)}", file=sys.stderr)
        return 1
    return code


def _print_in_any_encoding() -> None:
    """Characters that the output cannot encode become question marks: a verdict is never lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def one_line(error: Exception) -> str:
    """The error message in one line."""
    message = environment.in_words(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            name = "SGLang" if package == "sglang" else package
            message = f"{name} is not installed in this Python, {sys.executable}: {message}"
    return f"{message} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-nsa-plugin",
        description="Attention metadata of speculative steps, for SGLang's NSA/DSA sparse attention.",
        epilog="example: sglang-nsa-plugin verify",
    )
    parser.add_argument("--version", action="version", version=version("sglang-nsa-plugin"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_verify(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_ab(commands)
    return parser


def _add_verify(commands: Commands) -> None:
    verify = _command(
        commands,
        "verify",
        help="check this machine: which kernel would fill the metadata (about 20 s)",
        description="Prints what is installed, whether SGLang would load the plugin, and whether the "
        "adapter fits this SGLang. Then runs one fill with each implementation, compares the values, "
        "times it, and prints a verdict. Needs no model. The exit code is 0 when the best "
        "implementation for this machine would be active: the CUDA kernel, or its CPU twin on a machine "
        "without a GPU.",
        epilog="example: sglang-nsa-plugin verify --json | jq -r .verdict",
    )
    verify.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the result to FILE as JSON; without FILE, print only the JSON",
    )
    verify.set_defaults(run=_verify)


def _add_demo(commands: Commands) -> None:
    demo = _command(
        commands,
        "demo",
        help="fill SGLang's real backend and compare every value with SGLang's own fill",
        description="Lets SGLang load the plugin, runs SGLang's real attention backend through random "
        "batches of each role (draft-extend, draft-decode, verify), and compares every tensor with "
        "SGLang's own fill. Needs no model. With a GPU it uses CUDA graphs and the CUDA kernel, without "
        "one the CPU twin. The exit code is 0 when all values are equal.",
        epilog="example: sglang-nsa-plugin demo --steps 500 --seed 7",
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        default=400,
        help="random batches of each role (default: 400)",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the random batches (default: 0)")
    demo.add_argument("--json", metavar="FILE", help="also write the result to FILE as JSON")
    demo.set_defaults(run=_demo)


def _add_bench(commands: Commands) -> None:
    bench = _command(
        commands,
        "bench",
        help="time one fill: SGLang's own, the plugin's and each kernel, in one run",
        description="Fills the same tensors with SGLang's own code, with SGLang's kernel alone, with "
        "the plugin's CUDA graph, with each implementation of the plugin, and with the Python code of "
        "SGLang 0.5.9. Varies the requests, the context, the table's width and the draft tokens. Also "
        "times SGLang's plan of each role and the plugin's. Compares all values first, then times host "
        "and GPU in alternating rounds. Takes about three minutes. Without a GPU it times the CPU twin, "
        "which tells nothing about a GPU.",
        epilog="example: sglang-nsa-plugin bench --quick --json bench.json",
    )
    bench.add_argument("--quick", action="store_true", help="fewer cases; takes less than a minute")
    bench.add_argument("--json", metavar="FILE", help="also write the result to FILE as JSON")
    bench.add_argument(
        "--plot",
        metavar="FILE",
        help="also plot µs over requests to FILE, PNG or SVG (needs sglang-nsa-plugin[bench])",
    )
    bench.set_defaults(run=_bench)


def _add_ab(commands: Commands) -> None:
    ab = _command(
        commands,
        "ab",
        help="measure on a running server what the plugin gains, by switching it on and off",
        description="Switches the plugin of a running server on and off in turn and compares the time "
        "of a speculative step. Nothing restarts, and the server is left as it was found. Sends batches "
        "of random prompts of its own; keep other traffic away meanwhile. The exit code is 0 if a "
        "result was resolved, 1 if none was, and 2 if the server has nothing to compare, which it says.",
        epilog="example: sglang-nsa-plugin ab localhost:30000 --requests 1,16,64",
    )
    ab.add_argument("url", metavar="URL", help="the address of one server, not of a load balancer")
    ab.add_argument(
        "--requests",
        type=_counts,
        default=(1, 16, 64),
        metavar="N,N",
        help="requests at once, a row of the table each (default: 1,16,64)",
    )
    ab.add_argument(
        "--input-len", type=_positive, default=512, metavar="N", help="tokens of a prompt (default: 512)"
    )
    ab.add_argument(
        "--output-len", type=_positive, default=256, metavar="N", help="tokens to answer (default: 256)"
    )
    ab.add_argument(
        "--rounds", type=_rounds, default=12, metavar="N", help="rounds of on, off, off (default: 12)"
    )
    ab.add_argument(
        "--load",
        choices=("own", "external"),
        default="own",
        help="external: send nothing, only switch and watch the load of others",
    )
    ab.add_argument(
        "--seconds",
        type=_positive,
        default=5,
        metavar="N",
        help="with --load external, how long to watch before the next switch (default: 5)",
    )
    ab.add_argument("--api-key", metavar="KEY", help="the server's --api-key")
    ab.add_argument("--admin-api-key", metavar="KEY", help="the server's --admin-api-key")
    ab.add_argument("--json", metavar="FILE", help="also write the result to FILE as JSON")
    ab.add_argument(
        "--plot",
        metavar="FILE",
        help="also plot the ratios to FILE, PNG or SVG (needs sglang-nsa-plugin[bench])",
    )
    ab.set_defaults(run=_ab)


def _command(
    commands: Commands, name: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A subcommand. --debug is accepted before its name and after it."""
    command = commands.add_parser(name, help=help, description=description, epilog=epilog)
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return command


def _positive(text: str) -> int:
    is_number = text.isascii() and text.isdecimal()
    if not is_number or len(text) > len(str(MOST)) or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 to {MOST:,}, got {text[:20]!r}")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most 18 digits, got {text[:20]!r}"
        )
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(each) for each in text.split(","))


def _rounds(text: str) -> int:
    rounds = _positive(text)
    if rounds < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(
            f"must be {FEWEST_ROUNDS} or more, got {rounds}: fewer rounds cannot tell a gain from noise"
        )
    return rounds


def _verify(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import verify

    return verify.run(arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli import demo

    return demo.run(arguments.steps, arguments.seed, arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli.bench import run as bench

    return bench.run(arguments.json, arguments.plot, arguments.quick)


def _ab(arguments: argparse.Namespace) -> int:
    from sglang_nsa_plugin.cli.ab import run as ab
    from sglang_nsa_plugin.cli.ab.server import Server

    settings = ab.Settings(
        requests=arguments.requests,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        rounds=arguments.rounds,
        load=arguments.load,
        seconds=arguments.seconds,
    )
    server = Server(arguments.url, arguments.api_key, arguments.admin_api_key)
    return ab.run(server, settings, arguments.json, arguments.plot)
