"""Real SGLang servers for tests and scripts: start, wait, ask, end.

    with Server(["--model-path", model], log_path=Path("a.log"), name="plugin") as server:
        server.wait_ready(limit_s=240)
        answer = server.generate([1, 2, 3], max_new_tokens=16)

A server that ends, breaks or hangs raises `ServerError` with the end of its log; every wait has a
limit. Leaving the `with` block ends every process that the server started and no other.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

LOG_TAIL_LINES = 60
REQUEST_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
POLL_S = 0.25
# SGLang's names of one list: up to 0.5.20, and from 0.5.12.post1 on.
HISTOGRAMS = ("spec_accept_histogram", "spec_correct_drafts_histogram")
PORTS = range(20_000, 30_000)


class ServerError(RuntimeError):
    """A server that ended, refused or did not answer in time; the message ends with its log."""


@dataclass(frozen=True)
class Answer:
    """One finished /generate request.

    Attributes:
        output_ids: the new tokens.
        seconds: from sending the request to having the whole answer.
        meta: SGLang's ``meta_info``.
    """

    output_ids: list[int]
    seconds: float
    meta: dict[str, Any]

    @property
    def steps(self) -> int:
        """Speculative steps (target verifications) of this request; none for a single token."""
        return int(self.meta.get("spec_verify_ct", 0))

    @property
    def histogram(self) -> list[int]:
        """How many steps accepted 0, 1, … drafts, without trailing zeros; empty without steps.

        Raises:
            ServerError: SGLang counted steps, and no drafts under a name that is known.
        """
        if not self.steps:
            return []
        counts = next((list(self.meta[name]) for name in HISTOGRAMS if name in self.meta), None)
        if counts is None:
            raise ServerError(
                f"meta_info: of {self.steps} speculative steps it must have "
                f"{' or '.join(HISTOGRAMS)}, got {', '.join(sorted(self.meta))}; this SGLang may have "
                "another name for it"
            )
        while counts and counts[-1] == 0:
            counts.pop()
        return counts

    @property
    def finish(self) -> dict[str, Any]:
        """SGLang's ``finish_reason``: its type, and the length, token or message."""
        return dict(self.meta.get("finish_reason") or {})


class Server:
    """One ``python -m sglang.launch_server`` in a session, and so a process group, of its own.

    Args:
        args: options for the server, without host and ports: those are chosen here.
        env: variables to set on top of this process's; None as a value removes one.
        log_path: receives standard output and error; kept.
        name: for error messages.
    """

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str | None] | None = None,
        *,
        log_path: Path,
        name: str = "server",
    ) -> None:
        self.name = name
        self.log_path = Path(log_path).resolve()
        self.port, nccl_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        ports = ["--host", "127.0.0.1", "--port", str(self.port), "--nccl-port", str(nccl_port)]
        self.command = [sys.executable, "-m", "sglang.launch_server", *args, *ports]
        self.env = changed_environment(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_after_s: float | None = None
        self.broken: str | None = None  # what failed; later requests then fail without waiting
        self._started = 0.0

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns at once."""
        if self.process is not None:
            raise ServerError(f"server {self.name}: already started; make a new Server")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.log_path.parent,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, limit_s: float) -> None:
        """Returns when one token has been generated: the HTTP server answers sooner than that.

        Raises:
            ServerError: the process ended, or no token came within ``limit_s`` of the start.
        """
        deadline = self._started + limit_s
        while not self._listens():
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._error(f"did not listen on port {self.port} within {limit_s:.0f} s")
            time.sleep(POLL_S)
        self.generate([1], 1, limit_s=max(deadline - time.monotonic(), 1.0))
        self.ready_after_s = time.monotonic() - self._started

    def generate(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int | None,
        *,
        limit_s: float = REQUEST_LIMIT_S,
        rid: str | None = None,
        routed_dp_rank: int | None = None,
        **sampling: Any,
    ) -> Answer:
        """Sends one request; greedy and without end token unless ``sampling`` says otherwise.

        Args:
            input_ids: the prompt.
            max_new_tokens: None for as many as the context holds.
            limit_s: for the whole answer.
            rid: the request's name, for `abort`.
            routed_dp_rank: the data parallel rank that takes it; None lets SGLang choose.
            sampling: SGLang's ``sampling_params``.
        """
        body: dict[str, Any] = {
            "input_ids": list(input_ids),
            "sampling_params": _sampling(max_new_tokens, sampling),
        }
        body |= {} if rid is None else {"rid": rid}
        body |= {} if routed_dp_rank is None else {"routed_dp_rank": routed_dp_rank}
        begin = time.perf_counter()
        reply = self.request("POST", "/generate", limit_s, json=body)
        return _answer(reply, time.perf_counter() - begin)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        limit_s: float = REQUEST_LIMIT_S,
        **sampling: Any,
    ) -> list[Answer]:
        """Sends all prompts in one request, which SGLang schedules together; answers in their order."""
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": [_sampling(count, sampling) for count in max_new_tokens],
        }
        begin = time.perf_counter()
        replies = self.request("POST", "/generate", limit_s, json=body)
        seconds = time.perf_counter() - begin
        return [_answer(reply, seconds) for reply in replies]

    def generate_at_once(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> tuple[list[Answer], float]:
        """Sends all prompts together; the answers in their order, and the seconds for all."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            begin = time.perf_counter()
            pending = [
                pool.submit(self.generate, prompt, max_new_tokens, **options) for prompt in prompts
            ]
            answers = [future.result() for future in pending]
            return answers, time.perf_counter() - begin

    def abort(self, rid: str) -> None:
        """Ends the request of this name; its answer has what it got so far."""
        self._require_ok("POST", "/abort_request", REQUEST_LIMIT_S, json={"rid": rid})

    def server_info(self) -> dict[str, Any]:
        """``GET /server_info``: arguments, and one ``internal_states`` entry for each scheduler."""
        return dict(self.request("GET", "/server_info", REQUEST_LIMIT_S))

    def flush_cache(self, limit_s: float = 10.0) -> None:
        """Empties the prefix cache. Refused while a request runs, so it is tried again."""
        deadline = time.monotonic() + limit_s
        while True:
            reply = self.send("POST", "/flush_cache", REQUEST_LIMIT_S)
            if reply.ok:
                return
            if time.monotonic() > deadline:
                raise self._error(f"did not flush its cache within {limit_s:.0f} s: {reply.text}")
            time.sleep(POLL_S)

    def request(self, method: str, path: str, limit_s: float, **options: Any) -> Any:
        """What the server answers, as JSON.

        Raises:
            ServerError: it refused, broke off or did not answer within ``limit_s``.
        """
        return self._require_ok(method, path, limit_s, **options).json()

    def send(self, method: str, path: str, limit_s: float, **options: Any) -> requests.Response:
        """The answer whatever its status, for requests that may be refused; ``options`` of requests.

        Raises:
            ServerError: the server broke off or did not answer within ``limit_s``.
        """
        if self.broken is not None:
            raise self._error(f"is not asked again, because it {self.broken}")
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment cannot reach this machine
            try:
                return session.request(method, self.url + path, timeout=(5.0, limit_s), **options)
            except requests.Timeout as error:
                self.broken = f"did not answer {method} {path} within {limit_s:.0f} s"
                raise self._error(self.broken) from error
            except requests.ConnectionError as error:
                self.broken = f"broke off {method} {path}: {error}"
                raise self._error(self.broken) from error

    def log(self) -> str:
        """Everything that the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def pids(self) -> set[int]:
        """Of all its processes."""
        if self.process is None:
            return set()
        return {self.process.pid, *(process.pid for process in _descendants(self.process.pid))}

    def stop(self) -> None:
        """Ends the whole process group: SIGTERM, and SIGKILL after `STOP_LIMIT_S` seconds.

        Schedulers outlive a killed parent, and a helper may have left the group: descendants are
        listed before the first signal, and those still there at the end are killed as well.
        """
        if self.process is None:
            return
        group = self.process.pid
        descendants = _descendants(group)
        for number, limit_s in ((signal.SIGTERM, STOP_LIMIT_S), (signal.SIGKILL, STOP_LIMIT_S)):
            if not _signal_group(group, number):
                break
            self._wait_group_gone(group, limit_s)
        for process in descendants:
            # psutil compares start times, so a reused id is not taken for the old process
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, STOP_LIMIT_S)
        self.process.wait(STOP_LIMIT_S)
        self.process = None

    def _wait_group_gone(self, group: int, limit_s: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.process.poll()  # reaps the leader
            if not _group_members(group):
                return
            time.sleep(POLL_S)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _require_ok(self, method: str, path: str, limit_s: float, **options: Any) -> requests.Response:
        reply = self.send(method, path, limit_s, **options)
        if not reply.ok:
            raise self._error(f"answered {method} {path} with {reply.status_code}: {reply.text}")
        return reply

    def _check_alive(self) -> None:
        if self.process is None:
            raise ServerError(f"server {self.name}: not started; call start() or use 'with'")
        code = self.process.poll()
        if code is not None:
            raise self._error(f"ended with exit code {code}")

    def _error(self, what: str) -> ServerError:
        lines = self.log().splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(lines)
        return ServerError(
            f"server {self.name} {what}\n"
            f"its command: {' '.join(self.command)}\n"
            f"the last {len(lines)} lines of {self.log_path}:\n{tail}"
        )


def _sampling(max_new_tokens: int | None, more: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": 0.0, "ignore_eos": True, **more}


def _answer(reply: Mapping[str, Any], seconds: float) -> Answer:
    return Answer(list(reply.get("output_ids") or ()), seconds, dict(reply["meta_info"]))


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nothing listens on now.

    SGLang 0.5.14 derives a second port from its own, 10,000 higher, which has to be one, too: those that
    the system hands out are too high.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            _bind_to_any(each)
        return [each.getsockname()[1] for each in sockets]


def _bind_to_any(unbound: socket.socket) -> None:
    for port in random.SystemRandom().sample(PORTS, k=100):
        with suppress(OSError):  # taken
            unbound.bind(("127.0.0.1", port))
            return
    raise ServerError(f"100 ports between {PORTS.start} and {PORTS.stop} are taken")


def changed_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with ``changes``; None as a value removes a variable.

    Folders in PYTHONPATH become absolute, because the server runs in another folder.
    """
    merged: dict[str, str | None] = {**os.environ, **changes}
    search = [str(Path(p).resolve()) for p in (merged.get("PYTHONPATH") or "").split(os.pathsep) if p]
    merged["PYTHONPATH"] = os.pathsep.join(search) or None
    return {name: value for name, value in merged.items() if value is not None}


def _signal_group(group: int, number: signal.Signals) -> bool:
    """False when the group has no process left."""
    if not _group_members(group):
        return False
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _group_members(group: int) -> list[int]:
    """Processes of the group that still run; a zombie only waits to be reaped."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # pid (command) state parent group …; the command may hold blanks and parentheses
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            members.append(int(entry.name))
    return members


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
