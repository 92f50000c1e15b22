"""The slowest steps of a server whose traffic brings batch sizes that it has not seen, on and off.

    make serve-test PART=first-minute ARGS='--roles draft-extend,verify'

A client reads one long answer while other requests join it, one after the other, until 24 run at once.
SGLang compiles its metadata kernels at the first replay of each batch size, and all requests wait. The
servers run one after the other, the one with the plugin first: what it compiles, but for Triton's
kernels, the second one finds. Neither finds a metadata kernel of SGLang's in Triton's cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from integration.releases import differences
from integration.releases.differences import TRITON_CACHE
from integration.serving.ab_servers import START_LIMIT_S, Environment, serve_args
from integration.serving.compare import prompts
from integration.serving.gain_cells import captured
from integration.serving.server import Answer, Server
from integration.serving.test_gain import environment, keep
from sglang_nsa_plugin.cli.ab.run import filled_roles
from sglang_nsa_plugin.options import VARIABLE

SIZES = tuple(range(1, 25))
EVENTS_EACH = 40  # of the answer that is read, before the next request joins
# Of each request: 4 a step at most, so that none has ended when the last one has joined, and all fit.
NEW_TOKENS = 7_000
PROMPT = 64  # tokens
LONGEST = 8  # pauses that are reported
LIMIT_S = 240.0
KERNELS = "_fused_dsa_"  # SGLang's metadata kernels, which it compiles for each batch size


def test_first_minute(gpus: int, model: Path, folder: Path, roles: str | None, tmp_path: Path) -> None:
    """Longest pauses in a stream of tokens while the batch grows, where nothing is compiled yet."""
    if not gpus:
        pytest.skip("needs an NVIDIA GPU, nvidia-smi lists none")
    with_plugin = environment(roles)
    arms: dict[str, Environment] = {"on": with_plugin, "off": {**with_plugin, VARIABLE: "off"}}
    args = ["--model-path", str(model), *serve_args(), *captured(SIZES)]
    found: dict[str, Any] = {}
    filled: list[str] = []
    for name, variables in arms.items():
        cache = cache_without_metadata_kernels(tmp_path / name)
        env = {**variables, "TRITON_CACHE_DIR": str(cache)}
        log_path = folder / f"first-minute-{name}.log"
        with Server(args, env, log_path=log_path, name=name) as target:
            target.wait_ready(START_LIMIT_S)
            if name == "on":
                states = target.server_info()["internal_states"]
                filled = filled_roles([state["nsa_metadata"] for state in states])
            found[name] = pauses(target)
            print(f"\nfirst minute, {name}: {found[name]}", flush=True)
    keep(
        f"first-minute.{'+'.join(sorted(filled))}",
        {"sglang": version("sglang"), "roles": filled, **found},
    )
    assert filled
    assert all(each["at_once"] == SIZES[-1] for each in found.values()), found


def cache_without_metadata_kernels(folder: Path) -> Path:
    """This user's cache of compiled Triton kernels, as on a host where other kernels were compiled."""
    home = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / differences.of(TRITON_CACHE)))
    shutil.copytree(home, folder, dirs_exist_ok=True) if home.is_dir() else folder.mkdir()
    for kernel in folder.glob(f"*/{KERNELS}*.json"):
        shutil.rmtree(kernel.parent, ignore_errors=True)
    return folder


def pauses(target: Server) -> dict[str, Any]:
    """How long a client waited for the next tokens of a long answer, ms, while others joined it."""
    target.generate(prompts([PROMPT], seed=0)[0], 1)  # a prefill: its kernels are not in question
    times: list[float] = []
    joined: list[Future[Answer]] = []
    with ThreadPoolExecutor(len(SIZES)) as pool:
        try:
            with closing(stream(target, NEW_TOKENS)) as events:
                for _ in events:
                    times.append(time.perf_counter())
                    if len(times) % EVENTS_EACH:
                        continue
                    if len(joined) == len(SIZES) - 1:
                        break
                    joined.append(pool.submit(join, target, len(joined) + 1))
        finally:
            for number in range(len(joined)):
                target.abort(name_of(number + 1))
    return {**figures(times), "at_once": 1 + sum(map(was_running, joined))}


def join(target: Server, number: int) -> Answer:
    """One more request, until it is aborted."""
    (prompt,) = prompts([PROMPT], seed=number)
    return target.generate(prompt, NEW_TOKENS, rid=name_of(number), limit_s=LIMIT_S)


def name_of(number: int) -> str:
    """Of a request that joins."""
    return f"joins-{number}"


def was_running(joined: Future[Answer]) -> bool:
    """Whether this request still ran when it was aborted."""
    return joined.result().finish.get("type") == "abort"


def figures(times: list[float]) -> dict[str, Any]:
    """Of the pauses between these times."""
    ms = sorted((1_000 * (after - before) for before, after in pairwise(times)), reverse=True)
    return {
        "pauses": len(ms),
        "seconds": round(times[-1] - times[0], 1),
        "longest_ms": [round(each, 1) for each in ms[:LONGEST]],
        "median_ms": round(statistics.median(ms), 2),
        "over_100_ms": sum(each > 100 for each in ms),
    }


def stream(target: Server, new_tokens: int) -> Generator[bytes]:
    """The chunks of one answer, as they come. Closing it ends the request."""
    body: dict[str, Any] = {
        "input_ids": prompts([PROMPT], seed=len(SIZES))[0],
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": True,
    }
    with requests.Session() as session:
        session.trust_env = False  # a proxy of the environment cannot reach this machine
        with session.post(f"{target.url}/generate", json=body, stream=True, timeout=LIMIT_S) as reply:
            reply.raise_for_status()
            yield from (line for line in reply.iter_lines() if line.startswith(b"data: {"))
