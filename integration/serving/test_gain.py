"""What the plugin gains, by switching it inside one running server, alone on the GPU.

    python -m integration.serving.serve_test gain
    python -m integration.serving.serve_test gain -- -k "narrow or 61"

``sglang-nsa-plugin ab`` is run against one server after another, as a user runs it. A cell is the fill
switched on ÷ off; its control is off ÷ off. Two layers of a real checkpoint are bound by the host. 61
thin layers of dummy weights have the kernels and the graph of a full model, and are bound by the GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from integration import result_files
from integration.serving.ab_servers import (
    FP8,
    NO_PROBE,
    PLUGIN_ENV,
    START_LIMIT_S,
    serve_args,
)
from integration.serving.compare import prompts
from integration.serving.server import Server

COMMAND = "make serve-test PART=gain"
REQUESTS = (1, 16, 64)
MILLION = 1 << 20
RESOLVED, NOT_RESOLVED = 0, 1  # exit codes of ab: some cells are, or none
LIMIT_S = 240.0


@dataclass(frozen=True)
class Regime:
    """A server of the table."""

    layers: int
    context: int
    is_fp8: bool = False

    @property
    def name(self) -> str:
        """As the result file names it."""
        context = "1m" if self.context == MILLION else "160k"
        return f"{self.layers}-layers-{context}-{'fp8' if self.is_fp8 else 'bf16'}"

    @property
    def options(self) -> list[str]:
        """Of ``ab``. Steps of two layers are short and uneven; with dummy weights a step is a token."""
        rounds, new_tokens = (12, 512) if self.layers == 2 else (7, 96)
        return ["--rounds", str(rounds), "--output-len", str(new_tokens)]

    @property
    def args(self) -> list[str]:
        """Options of the server; those of a server that has the GPU to itself win."""
        overrides: dict[str, Any] = {}
        args = serve_args("flashmla_kv" if self.is_fp8 else "flashmla_sparse")
        args += [*(FP8 if self.is_fp8 else ()), *captured(REQUESTS)]
        if self.layers > 2:
            overrides["num_hidden_layers"] = self.layers
            args += ["--load-format", "dummy"]
        if self.context == MILLION:
            overrides["max_position_embeddings"] = MILLION
            args += ["--context-length", str(MILLION)]
        return [*args, *(["--json-model-override-args", json.dumps(overrides)] if overrides else [])]


REGIMES = (
    Regime(2, 163_840),
    Regime(61, 163_840),
    Regime(61, MILLION),
    Regime(2, 163_840, is_fp8=True),
    Regime(61, 163_840, is_fp8=True),
)


def keep(part: str, figures: dict[str, Any]) -> None:
    """Each GPU has a result file, gain-GPU-VERSION.json."""
    file = f"gain-{result_files.gpu_name()}-{version('sglang')}.json"
    result_files.merge(file, COMMAND, {part: figures}, alone=True)


def captured(sizes: tuple[int, ...]) -> list[str]:
    """Options that capture graphs for these numbers of requests alone: the server starts sooner."""
    most = str(sizes[-1])
    graphs = ["--cuda-graph-max-bs", most, "--cuda-graph-bs", *map(str, sizes)]
    return [*graphs, "--max-running-requests", most]


@pytest.fixture
def server(request: pytest.FixtureRequest, gpus: int, model: Path, folder: Path) -> Iterator[Server]:
    """One server of a regime, with nothing else on the GPU."""
    regime: Regime = request.param
    if not gpus:
        pytest.skip("needs an NVIDIA GPU, nvidia-smi lists none")
    args = ["--model-path", str(model), *regime.args]
    log_path = folder / f"{regime.name}.log"
    with Server(args, {**PLUGIN_ENV, **NO_PROBE}, log_path=log_path, name=regime.name) as running:
        running.wait_ready(START_LIMIT_S)
        yield running


@pytest.mark.parametrize("server", REGIMES, ids=lambda regime: regime.name, indirect=True)
def test_gain(server: Server, folder: Path, request: pytest.FixtureRequest) -> None:
    """Every cell has its control beside it; a cell whose control is off says that it is not resolved."""
    regime: Regime = request.node.callspec.params["server"]
    found = compare(server, regime.options, folder / f"{server.name}.json")
    keep(server.name, found)
    assert [cell["load"] for cell in found["cells"]] == list(map(str, REQUESTS))
    assert all(cell["verdict"] for cell in found["cells"])


def compare(server: Server, options: list[str], file: Path) -> dict[str, Any]:
    """What ``sglang-nsa-plugin ab`` finds."""
    command = [sys.executable, "-m", "sglang_nsa_plugin", "ab", server.url]
    options = [*options, "--requests", ",".join(map(str, REQUESTS)), "--json", str(file)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    print(done.stdout)
    assert done.returncode in (RESOLVED, NOT_RESOLVED), done.stderr
    found = dict(json.loads(file.read_text()))
    for cell in found["cells"]:
        cell.pop("every_round", None)  # the medians and ranges are kept
    return found


# The first minute

SIZES = tuple(range(1, 25))
JOIN_EVERY_S = 1.0
LONG, SHORT = 3_000, 900  # new tokens of the request that is watched, and of those that join it
PROMPT = 64  # tokens
PAUSES = 8  # reported: the longest
KERNELS = "_fused_dsa_"  # SGLang's metadata kernels, which it compiles for each batch size
ARMS = {"off": {**PLUGIN_ENV, "SGLANG_NSA_METADATA_BACKEND": "off"}, "on": PLUGIN_ENV}


def test_first_minute(gpus: int, model: Path, folder: Path, tmp_path: Path) -> None:
    """Longest pauses in a stream of tokens while the batch grows, where nothing is compiled yet."""
    if not gpus:
        pytest.skip("needs an NVIDIA GPU, nvidia-smi lists none")
    args = ["--model-path", str(model), *serve_args(), *captured(SIZES)]
    found = {}
    for name, environment in ARMS.items():
        cache = cache_without_metadata_kernels(tmp_path / name)
        env = {**environment, **NO_PROBE, "TRITON_CACHE_DIR": str(cache)}
        log_path = folder / f"first-minute-{name}.log"
        with Server(args, env, log_path=log_path, name=name) as target:
            target.wait_ready(START_LIMIT_S)
            found[name] = pauses(target)
    keep("first-minute", found)
    assert all(each["pauses"] > LONG // 8 for each in found.values()), found


def cache_without_metadata_kernels(folder: Path) -> Path:
    """This user's cache of compiled Triton kernels, as on a host where other kernels were compiled."""
    home = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    shutil.copytree(home, folder, dirs_exist_ok=True) if home.is_dir() else folder.mkdir()
    for kernel in folder.glob(f"*/{KERNELS}*.json"):
        shutil.rmtree(kernel.parent, ignore_errors=True)
    return folder


def pauses(target: Server) -> dict[str, Any]:
    """How long a client waited for the next tokens of a long answer, ms, while others joined it."""
    joining = threading.Thread(target=join_one_by_one, args=(target,))
    times = []
    for _ in stream(target, LONG):
        times.append(time.perf_counter())
        if len(times) == 1:
            joining.start()
    joining.join()
    ms = sorted((1_000 * (after - before) for before, after in pairwise(times)), reverse=True)
    return {
        "pauses": len(ms),
        "longest_ms": [round(each, 1) for each in ms[:PAUSES]],
        "median_ms": round(statistics.median(ms), 2),
        "over_100_ms": sum(each > 100 for each in ms),
    }


def join_one_by_one(target: Server) -> None:
    """Each further request makes a batch size that the server has not seen."""
    threads = []
    for number in range(len(SIZES) - 1):
        threads.append(
            threading.Thread(target=target.generate, args=(*prompts([PROMPT], number), SHORT))
        )
        threads[-1].start()
        time.sleep(JOIN_EVERY_S)
    for each in threads:
        each.join()


def stream(target: Server, new_tokens: int) -> Iterator[bytes]:
    """The chunks of one answer, as they come."""
    body: dict[str, Any] = {
        "input_ids": prompts([PROMPT], seed=-1)[0],
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": True,
    }
    with requests.Session() as session:
        session.trust_env = False  # a proxy of the environment cannot reach this machine
        with session.post(f"{target.url}/generate", json=body, stream=True, timeout=LIMIT_S) as reply:
            reply.raise_for_status()
            yield from (line for line in reply.iter_lines() if line.startswith(b"data: {"))
