"""Do empty kernels before each replay make a server's steps shorter, and a coarse fence longer?

    python -m integration.serving.programmatic_noop [--layers 61] [--json FILE]
    python -m integration.serving.programmatic_noop --servers plugin --layers 2 --rounds 12 --alone \\
        --settings off "coarse fence" "off again" --json FILE

Switched inside one running server, alone on the GPU and beside a process that only holds a context, with
off ÷ off as the control: once with SGLang as it is and once with sglang-nsa-plugin. The empty kernels
have programmatic launch. With the coarse fence SGLang's scheduler waits for the whole forward, and not
for the event after the reads of the draft's graph. Needs an NVIDIA GPU and SGLang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from integration import result_files
from integration.gpu import node_gaps
from integration.serving.ab_servers import python_path, serve_args
from integration.serving.checkpoint import write_checkpoint
from integration.serving.server import Server

PROBE = Path(__file__).parent / "noop_probe"


class Setting(NamedTuple):
    """What the probe does; it knows the names of what is launched before each replay."""

    before: str = "nothing"
    only_deepest: bool = False
    coarse_fence: bool = False


SETTINGS = {
    "off": Setting(),
    "no-op": Setting("no-op"),
    "no-op before verify": Setting("no-op", only_deepest=True),
    "8 no-ops": Setting("8 no-ops"),
    "forked graph": Setting("forked graph"),
    "coarse fence": Setting(coarse_fence=True),
    "off again": Setting(),
}
NO_OPS = [name for name in SETTINGS if name != "coarse fence"]
SERVERS: dict[str, dict[str, str | None]] = {
    "SGLang": {"SGLANG_NSA_METADATA_BACKEND": "off"},
    "plugin": {"SGLANG_NSA_METADATA_BACKEND": None},
}
START_LIMIT_S, ANSWER_LIMIT_S = 420.0, 30.0
PROMPT_TOKENS, NEW_TOKENS = 200, 96
SETTLING = 3  # steps at either end of a run that are left out


class Switched:
    """A running server in which files switch what is launched before a replay."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self._asked = 0

    def ask(self, setting: Setting) -> list[float]:
        """Switches, and returns the µs of the steps since the request before."""
        self._asked += 1
        new = self.folder / "ask.new"
        new.write_text(json.dumps({"id": self._asked, **setting._asdict()}))
        new.replace(self.folder / "ask")
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while time.monotonic() < deadline:
            done = self.folder / "done"
            found = json.loads(done.read_text()) if done.is_file() else {}
            if found.get("id") == self._asked:
                return list(found["gaps_us"])
            time.sleep(0.005)
        raise RuntimeError(f"the probe did not answer within {ANSWER_LIMIT_S:.0f} s")

    def step_us(self, setting: Setting, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        """The median time of a step while these prompts are answered, and the token ids."""
        self.server.flush_cache()
        self.ask(setting)
        answers, _ = self.server.generate_at_once(prompts, NEW_TOKENS)
        gaps = self.ask(setting)
        return statistics.median(gaps[SETTLING:-SETTLING] or gaps), [a.output_ids for a in answers]


def measure(switched: Switched, requests: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """Ratios to "off" of the same round, with the order of settings rotated."""
    rows = []
    for turn in range(-1, rounds):  # the first one warms up
        random_tokens = random.Random(turn)
        prompts = [
            [random_tokens.randrange(1, 4_000) for _ in range(PROMPT_TOKENS)] for _ in range(requests)
        ]
        first = turn % len(names)
        order = names[first:] + names[:first]
        rows.append({name: switched.step_us(SETTINGS[name], prompts) for name in order})
    rows = rows[1:]
    return {
        name: {
            "step_us": round(statistics.median(row[name][0] for row in rows), 1),
            "ratio": node_gaps.spread([row[name][0] / row["off"][0] for row in rows], digits=4),
            "same_tokens": sum(row[name][1] == row["off"][1] for row in rows),
            "rounds": len(rows),
        }
        for name in names
    }


def serve(name: str, model: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One server, alone and then beside a context."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = json.dumps({"num_hidden_layers": asked.layers})
        args = ["--model-path", str(model), *serve_args(), "--load-format", "dummy", "--sleep-on-idle"]
        if asked.layers > 2:
            args += ["--json-model-override-args", overrides]
        env = {"PYTHONPATH": python_path(PROBE), "NOOP_PROBE_DIR": folder, **SERVERS[name]}
        rows = []
        with Server(args, env, log_path=Path(folder) / f"{name}.log", name=name) as server:
            server.wait_ready(START_LIMIT_S)
            switched = Switched(server, Path(folder))
            for beside in (None,) if asked.alone else (None, "context"):
                with node_gaps.beside(beside) if beside else contextlib.nullcontext():
                    for requests in asked.requests:
                        found = measure(switched, requests, asked.rounds, asked.settings)
                        row = {"server": name, "beside": beside, "requests": requests, **found}
                        print(json.dumps(row), flush=True)
                        rows.append(row)
        return rows


def command_of(arguments: argparse.Namespace) -> str:
    """The command that measures the same again."""
    options = {
        **({"--alone": []} if arguments.alone else {}),
        "--layers": [arguments.layers],
        "--rounds": [arguments.rounds],
        "--requests": arguments.requests,
        "--servers": arguments.servers,
        "--settings": arguments.settings,
    }
    words = [word for name, values in options.items() for word in (name, *map(str, values))]
    return f"python -m integration.serving.programmatic_noop {shlex.join(words)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=NO_OPS, help="with off")
    parser.add_argument("--alone", action="store_true", help="nothing beside a context")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(folder)
        for name in arguments.servers:
            rows += serve(name, model, arguments)
    if arguments.json:
        result = {
            "command": command_of(arguments),
            **result_files.environment(),
            "host": node_gaps.host(),
            "rows": rows,
        }
        arguments.json.write_text(result_files.as_text(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
