"""The servers of the tests: with the plugin and as SGLang is, same flags, started ahead of their tests.

with Fleet(model, folder, [EAGER, FP8], at_once=8) as fleet:
    servers = fleet.ready(EAGER)
    servers["plugin"].generate([1, 2, 3], 16)
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from integration.releases import differences
from integration.serving.server import POLL_S, Server, ServerError

PROBE = Path(__file__).parent / "probe"
# Which plans the plugin is to fill. NSA_TEST_ROLES names others, for a release that lacks one: for every
# server then, while without it only those tests name roles that are about them.
TEST_ROLES = os.environ.get("NSA_TEST_ROLES")
ROLES = tuple((TEST_ROLES or "draft-extend,draft-decode,verify").split(","))
# Until all of a setup are ready: on a host that never served it, SGLang compiles for up to five minutes.
START_LIMIT_S = 420.0
CORRUPT_LIMIT_S = 10.0
LARGEST_GRAPH = 16

# Servers share one GPU, each with a KV cache of fixed size. One that starts counts what others take
# between its two looks at the free memory as its own: the limit of that is far up.
SHARED_GPU_ARGS = (
    *("--mem-fraction-static", "0.8"),
    *("--max-total-tokens", "200000"),
    "--skip-server-warmup",
)
# Idle servers leave the cores to those that start.
MANY = ("--sleep-on-idle",)
FP8 = ("--kv-cache-dtype", "fp8_e4m3")

# The servers differ in nothing but this. SGLang finds every installed plugin by itself; naming one
# leaves the others out. Settings of the shell that could change the plugin's choice are removed.
Environment = Mapping[str, str | None]
PLUGIN_ENV: Environment = {
    "SGLANG_PLUGINS": None,
    "SGLANG_NSA_METADATA_BACKEND": None,
    "SGLANG_NSA_METADATA_CHECK": None,
    "SGLANG_NSA_METADATA_ROLES": TEST_ROLES,
    "SGLANG_NSA_METADATA_WIDE_TABLES": None,
}
ALL_ROLES_ENV: Environment = {**PLUGIN_ENV, "SGLANG_NSA_METADATA_ROLES": ",".join(ROLES)}
SGLANG_ENV: Environment = {"SGLANG_PLUGINS": "probe"}
ENVIRONMENTS: Mapping[str, Environment] = {"plugin": PLUGIN_ENV, "sglang": SGLANG_ENV}
# The probe keeps an event of each replay: without it memory stays, under minutes of load.
NO_PROBE: Environment = {"NSA_PROBE_DIR": None}


def python_path(*folders: Path) -> str:
    """PYTHONPATH with the folders of these plugins ahead of its own."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def serve_args(decode_backend: str = "flashmla_sparse", draft_tokens: int = 4) -> list[str]:
    """The options of a small server, spelled as the installed SGLang spells them.

    The last verified token is one of the draft tokens, so there is a step less than there are of them.
    Without draft tokens the server does not speculate.
    The graphs of prefill take minutes to capture and have nothing to do with draft-extend.
    """
    speculation = (
        *("--speculative-algorithm", "EAGLE"),
        *("--speculative-num-steps", str(draft_tokens - 1)),
        *("--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(draft_tokens)),
    )
    return [
        *(speculation if draft_tokens else ()),
        *differences.sparse_backend(decode_backend),
        *SHARED_GPU_ARGS,
        *differences.decode_graphs(LARGEST_GRAPH),
        differences.of(differences.NO_PREFILL_GRAPH),
    ]


@dataclass(frozen=True)
class Setup:
    """Servers that are started together and differ in nothing but their environment.

    Attributes:
        name: of the parts in the result file and of the folder of logs.
        flags: added after those of `serve_args`; where both name an option, these win.
        environments: by the server's name, the variables that make the difference; None removes one.
        decode_backend: SGLang's sparse attention.
        draft_tokens: verified in each speculative step; 0 for servers without speculation.
        gpus: how many a server takes.
    """

    name: str
    flags: tuple[str, ...] = ()
    environments: Mapping[str, Environment] = field(default_factory=lambda: ENVIRONMENTS)
    decode_backend: str = "flashmla_sparse"
    draft_tokens: int = 4
    gpus: int = 1

    @property
    def args(self) -> list[str]:
        """The options of each of its servers, without the model."""
        return [*serve_args(self.decode_backend, self.draft_tokens), *self.flags]


class AbServer(Server):
    """A server with the folder where its probe writes measurements."""

    def __init__(
        self, args: Sequence[str], env: Environment, probe_dir: Path, *, log_path: Path, name: str
    ) -> None:
        super().__init__(args, env, log_path=log_path, name=name)
        self.probe_dir = probe_dir

    def corrupt(self, *fields: str) -> None:
        """From now on the probe corrupts these tensors of SGLang's metadata after each fill, no others.

        For servers started with NSA_PROBE_CORRUPT, see integration/serving/probe/.

        Raises:
            ServerError: the probe does not say within `CORRUPT_LIMIT_S` seconds that they are.
        """
        wanted = ",".join(fields)
        (self.probe_dir / "corrupt").write_text(wanted)
        done = self.probe_dir / "corrupted"
        deadline = time.monotonic() + CORRUPT_LIMIT_S
        while not done.is_file() or done.read_text() != wanted:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"server {self.name}: the probe did not corrupt {wanted or 'nothing'} within "
                    f"{CORRUPT_LIMIT_S:.0f} s; see {self.log_path}"
                )
            time.sleep(POLL_S)


class AbServers(dict[str, AbServer]):
    """Running servers by name, and the setup that they share."""

    def __init__(self, setup: Setup, servers: Mapping[str, AbServer]) -> None:
        super().__init__(servers)
        self.setup = setup


class Fleet:
    """Starts the servers of the setups in their order, ahead of the tests that use them.

    Args:
        model: the checkpoint.
        folder: for logs (``SETUP/SERVER.log``) and probe files (``SETUP/SERVER-probe/``).
        setups: those to start ahead; another is started when it is asked for.
        at_once: no more servers than this run ahead.
    """

    def __init__(
        self, model: Path, folder: Path, setups: Sequence[Setup] = (), at_once: int = 2
    ) -> None:
        self._model = model
        self._folder = folder
        self._waiting = list(setups)
        self._at_once = at_once
        self._running: dict[str, AbServers] = {}

    def __enter__(self) -> Fleet:
        self._start_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        stop_all(server for servers in self._running.values() for server in servers.values())
        self._running.clear()

    def ready(self, setup: Setup) -> AbServers:
        """The setup's servers, when each of them has generated a token."""
        servers = self._running.get(setup.name) or self._start(setup)
        for server in servers.values():
            server.wait_ready(START_LIMIT_S)
        return servers

    def done(self, setup: Setup) -> None:
        """Ends the setup's servers and starts the next ones."""
        stop_all(self._running.pop(setup.name, {}).values())
        self._start_ahead()

    def _start_ahead(self) -> None:
        while self._waiting:
            running = sum(len(servers) for servers in self._running.values())
            if running and running + len(self._waiting[0].environments) > self._at_once:
                return
            self._start(self._waiting[0])

    def _start(self, setup: Setup) -> AbServers:
        self._waiting = [other for other in self._waiting if other.name != setup.name]
        servers = AbServers(setup, {name: self._server(setup, name) for name in setup.environments})
        self._running[setup.name] = servers  # first: what has been started is ended also when one fails
        for server in servers.values():
            server.start()
        return servers

    def _server(self, setup: Setup, name: str) -> AbServer:
        folder = self._folder / setup.name
        probe_dir = (folder / f"{name}-probe").resolve()
        probe_dir.mkdir(parents=True)
        with_probe = {
            "PYTHONPATH": python_path(PROBE),
            "NSA_PROBE_DIR": str(probe_dir),
            **setup.environments[name],
        }
        model = ("--model-path", str(Path(self._model).resolve()))
        log_path = folder / f"{name}.log"
        return AbServer([*model, *setup.args], with_probe, probe_dir, log_path=log_path, name=name)


def stop_all(servers: Iterable[Server]) -> None:
    """Ends the servers side by side: each takes some seconds."""
    ending = list(servers)
    with ThreadPoolExecutor(max(len(ending), 1)) as pool:
        list(pool.map(Server.stop, ending))
