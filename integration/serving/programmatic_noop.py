"""Do empty kernels with programmatic launch before each replay make a real server's steps shorter?

    python -m integration.serving.programmatic_noop [--layers 61] [--json FILE]

Switched inside one running server, alone on the GPU and beside a process that only holds a context, with
off ÷ off as the control: once with SGLang as it is and once with sglang-nsa-plugin. Needs an NVIDIA GPU
and SGLang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from integration import result_files
from integration.gpu import node_gaps
from integration.serving.ab_servers import serve_args
from integration.serving.checkpoint import write_checkpoint
from integration.serving.server import Server

PROBE = Path(__file__).parent / "noop_probe"
# What is launched before each replay; the probe knows these names.
SETTINGS = {
    "off": "nothing",
    "no-op": "no-op",
    "8 no-ops": "8 no-ops",
    "forked graph": "forked graph",
    "off again": "nothing",
}
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

    def ask(self, before: str) -> list[float]:
        """Switches, and returns the µs of the steps since the request before."""
        self._asked += 1
        new = self.folder / "ask.new"
        new.write_text(json.dumps({"id": self._asked, "before": before}))
        new.replace(self.folder / "ask")
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while time.monotonic() < deadline:
            done = self.folder / "done"
            found = json.loads(done.read_text()) if done.is_file() else {}
            if found.get("id") == self._asked:
                return list(found["gaps_us"])
            time.sleep(0.005)
        raise RuntimeError(f"the probe did not answer within {ANSWER_LIMIT_S:.0f} s")

    def step_us(self, before: str, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        """The median time of a step while these prompts are answered, and the token ids."""
        self.server.flush_cache()
        self.ask(before)
        answers, _ = self.server.generate_at_once(prompts, NEW_TOKENS)
        gaps = self.ask(before)
        return statistics.median(gaps[SETTLING:-SETTLING] or gaps), [a.output_ids for a in answers]


def measure(switched: Switched, requests: int, rounds: int) -> dict[str, Any]:
    """Ratios to "off" of the same round, with the order of settings rotated."""
    names = list(SETTINGS)
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


def serve(name: str, model: Path, layers: int, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One server, alone and then beside a context."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = json.dumps({"num_hidden_layers": layers})
        args = ["--model-path", str(model), *serve_args(), "--load-format", "dummy", "--sleep-on-idle"]
        if layers > 2:
            args += ["--json-model-override-args", overrides]
        path = os.pathsep.join(filter(None, [str(PROBE), os.environ.get("PYTHONPATH")]))
        env = {"PYTHONPATH": path, "NOOP_PROBE_DIR": folder, **SERVERS[name]}
        rows = []
        with Server(args, env, log_path=Path(folder) / f"{name}.log", name=name) as server:
            server.wait_ready(START_LIMIT_S)
            switched = Switched(server, Path(folder))
            for beside in (None, "context"):
                with node_gaps.beside(beside) if beside else contextlib.nullcontext():
                    for requests in sizes:
                        found = measure(switched, requests, rounds)
                        row = {"server": name, "beside": beside, "requests": requests, **found}
                        print(json.dumps(row), flush=True)
                        rows.append(row)
        return rows


def command_of(arguments: argparse.Namespace) -> str:
    """The command that measures the same again."""
    options = {
        "--layers": [arguments.layers],
        "--rounds": [arguments.rounds],
        "--requests": arguments.requests,
        "--servers": arguments.servers,
    }
    words = [word for name, values in options.items() for word in (name, *map(str, values))]
    return " ".join(["python -m integration.serving.programmatic_noop", *words])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(folder)
        for name in arguments.servers:
            rows += serve(name, model, arguments.layers, arguments.requests, arguments.rounds)
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
