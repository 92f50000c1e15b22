"""A running SGLang server over HTTP: its records, its switch and its streamed answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

KEY = "nsa_metadata"  # in a rank's internal state, and in a request to switch
SWITCH_PATH = "/set_internal_state"
ANSWER_S = 60  # for the longest pause of an answer: a rank answers between two of its steps
BACK_S = 15  # the same, to leave the server as it was found
GENERATE_S = 600
PAUSES_S = (0.2, 0.5, 1, 2, 4)  # between attempts to leave the server as it was found
# What urllib and http.client raise for a server that is away, dies or speaks something else.
NO_ANSWER = (OSError, http.client.HTTPException)

Record = dict[str, Any]


class ServerError(RuntimeError):
    """The server gave no answer, or another one than was asked for."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key is for this server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Server:
    """One SGLang server.

    Args:
        url: its address; "http://" may be left out.
        api_key: what it was started with as ``--api-key``.
        admin_api_key: what it was started with as ``--admin-api-key``; the switch needs it then.
    """

    def __init__(self, url: str, api_key: str | None = None, admin_api_key: str | None = None) -> None:
        self.url = _checked_address(url)
        self.api_key = _checked_key("--api-key", api_key)
        self.admin_api_key = _checked_key("--admin-api-key", admin_api_key)
        self.answer_s: float = ANSWER_S
        self._pids: list[Any] | None = None  # of the ranks, at the first look
        self.has_met_others = False  # another process has answered since then

    def info(self) -> dict[str, Any]:
        """``GET /server_info``.

        Raises:
            ServerError: also where other processes answer than at the first look.
        """
        found = self._json("/server_info")
        states = found.get("internal_states") if isinstance(found, dict) else None
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise ServerError(f"{self.url}/server_info has no internal_states: this is no SGLang server")
        self._look_who_answers(found)
        return dict(found)

    def records(self) -> list[Record]:
        """The plugin's record of each rank that ``/server_info`` shows, in one order.

        Raises:
            ServerError: as :meth:`info`.
        """
        return _records_of(self.info())

    def _look_who_answers(self, info: dict[str, Any]) -> None:
        pids = [record.get("pid") for record in _records_of(info)]
        if self._pids is None:
            self._pids = pids
        elif pids != self._pids:
            self.has_met_others = True
            raise ServerError(
                f"other processes answer at {self.url} than before (pid {json.dumps(self._pids)}, now "
                f"{json.dumps(pids)}). Either the server was started again, and is switched on then, or "
                "the address leads to several replicas: give the address of one"
            )

    def metric(self, name: str) -> float | None:
        """The sum of a metric over its labels; None without it, or where ``/metrics`` is off."""
        try:
            with self._open("/metrics") as response:
                text = response.read().decode()
        except (ServerError, *NO_ANSWER):
            return None
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", text, re.MULTILINE)
        return sum(map(float, values)) if values else None

    def switch(self, on: bool) -> None:
        """Switches the plugin on every rank, and looks whether every rank says so."""
        answer = self._json(SWITCH_PATH, {"server_args": {KEY: int(on)}}, self.admin_api_key)
        if not isinstance(answer, list) or not answer or not all(each is True for each in answer):
            raise ServerError(
                f"{self.url}{SWITCH_PATH} answered {json.dumps(answer)} to {KEY} = {int(on)} instead of "
                "true for every rank: the server's log says why"
            )
        shown = [record.get("switched_on") for record in self.records()]
        if any(each is not on for each in shown):
            raise ServerError(
                f"not every rank of {self.url} was switched {_word(on)}: /server_info shows "
                f"switched_on = {json.dumps(shown)}"
            )

    def generate(self, prompts: list[list[int]], tokens: int) -> Iterator[bytes]:
        """One batch of requests, greedy and without an end token; the data of each event as it comes.

        Closing the iterator early closes the connection, and SGLang aborts the requests.
        """
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling, "stream": True}
        with self._open("/generate", body, limit_s=GENERATE_S) as response:
            try:
                for line in response:
                    if line.startswith(b"data: {"):
                        yield line[len(b"data: ") :]
            except NO_ANSWER as error:
                raise ServerError(f"{self.url}/generate broke off: {_in_words(error)}") from error

    def curl(self, on: bool) -> str:
        """The command that switches by hand."""
        key = "api" if self.admin_api_key is None else "admin-api"
        has_key = self.api_key is not None or self.admin_api_key is not None
        header = f" -H 'Authorization: Bearer <{key}-key>'" if has_key else ""
        body = json.dumps({"server_args": {KEY: int(on)}})
        json_type = "-H 'Content-Type: application/json'"  # curl before 7.82 has no --json
        return f"curl {self.url}{SWITCH_PATH}{header} {json_type} -d '{body}'"

    def _json(self, path: str, body: Any = None, key: str | None = None) -> Any:
        with self._open(path, body, key) as response:
            text = ""
            try:
                text = response.read().decode(errors="replace")
                return json.loads(text)
            except (ValueError, *NO_ANSWER) as error:
                what = f"{_readable(text)!r}" if text else _in_words(error)
                raise ServerError(
                    f"{self.url}{path} answered no JSON, but {what}: is this the address of an SGLang "
                    "server?"
                ) from error

    def _open(
        self, path: str, body: Any = None, key: str | None = None, limit_s: float | None = None
    ) -> Any:
        """An answer to be read: POST with a body, else GET."""
        key = key or self.api_key
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            return _OPENER.open(request, timeout=limit_s or self.answer_s)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.url}{path} answered {_refusal(error)}") from error
        except NO_ANSWER as error:
            raise ServerError(f"no answer from {self.url}{path}: {_in_words(error)}") from error


def _records_of(info: dict[str, Any]) -> list[Record]:
    records = [state.get(KEY) or {} for state in info["internal_states"]]
    return sorted(records, key=lambda record: record.get("pid") or 0)  # SGLang lists them as they answer


@contextlib.contextmanager
def left_as_found(server: Server, found_on: bool) -> Iterator[None]:
    """Switches back at the end, also after an error, Ctrl-C, SIGTERM or the end of the terminal.

    Where that fails the message on standard error has the command that does it by hand.
    """
    with _signals_as_exit(signal.SIGTERM, signal.SIGHUP):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            _say(f"switching the plugin {_word(found_on)}, as it was found")
            raise
        finally:
            _switch_back(server, found_on)


def _switch_back(server: Server, on: bool) -> None:
    """A signal does not cut the first attempt short, which a healthy server answers at once."""
    why, done = "interrupted", False
    server.answer_s = BACK_S
    try:
        with _held_back(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            why, done = _tried(server, on)
        for pause_s in PAUSES_S:
            if done:
                return
            time.sleep(pause_s)
            why, done = _tried(server, on)
    finally:
        if server.has_met_others:
            _say(
                f"more than one process answered at {server.url}, and another replica may have been "
                f"switched. Check that {KEY}.switched_on is {json.dumps(on)} in the /server_info of "
                "each replica, at its own address"
            )
        if not done:
            _say(
                f"could not switch the plugin {_word(on)} again, as it was found ({why}). If the server "
                f"still runs, do it by hand:\n    {server.curl(on)}"
            )


def _tried(server: Server, on: bool) -> tuple[str, bool]:
    """Why the server is not as it was found; and whether it is."""
    try:
        if any(each is not on for record in server.records() for each in _positions(record)):
            server.switch(on)
    except ServerError as error:
        return str(error), False
    return "", True


def _positions(record: Record) -> list[Any]:
    """Of the switches of a rank: draft-extend's, and of each role that is filled.

    They may differ: a role that has failed keeps its own.
    """
    filled = [role for role in record.get("roles", {}).values() if role.get("adapter")]
    return [each.get("switched_on") for each in (record, *filled)]


@contextlib.contextmanager
def _held_back(*signals: signal.Signals) -> Iterator[None]:
    """These signals wait until the end, and then have the effect of one."""
    came: list[int] = []
    with _handled(signals, lambda number, _: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def _signals_as_exit(*signals: signal.Signals) -> Iterator[None]:
    """These signals raise SystemExit, so that ``finally`` runs."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled(signals, leave):
        yield


@contextlib.contextmanager
def _handled(signals: Iterable[signal.Signals], handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handles these signals meanwhile, but for those that the process ignores, as nohup has it do."""
    heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _say(what: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have been closed
        print(f"sglang-nsa-plugin ab: {what}", file=sys.stderr, flush=True)


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return (
            f"HTTP {error.code}: it wants a key. Pass --api-key, and --admin-api-key if the server was "
            "started with one"
        )
    place = error.headers.get("Location")
    if error.code in (301, 302, 303, 307, 308) and place:
        address = place.removesuffix(urllib.parse.urlsplit(error.url).path)
        return f"HTTP {error.code}: it moved. Give its new address, {address}"
    try:
        text = _readable(error.read(2000).decode(errors="replace"))
    except NO_ANSWER:  # it broke off
        text = ""
    hint = ". Give the server's address alone, host:port" if error.code == 404 else ""
    return f"HTTP {error.code}: {text or error.reason}{hint}"


def _readable(text: str) -> str:
    """The beginning, in one line and without control characters."""
    line = " ".join(text.split())[:300]
    return "".join(each for each in line if each.isprintable())


def _checked_address(url: str) -> str:
    address = (url if "://" in url else f"http://{url}").strip().rstrip("/")
    try:
        parts = urllib.parse.urlsplit(address)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        _raise_unless_sendable(parts)
    except ValueError:
        is_one = False
    if not is_one:
        raise ServerError(
            f"URL must be an address like localhost:30000 or https://host:443, got {url!r}"
        )
    return address


def _raise_unless_sendable(parts: urllib.parse.SplitResult) -> None:
    """Raises ValueError for an address that http.client would fail at."""
    (parts.hostname or "").encode("idna")
    port = "" if parts.port is None else parts.netloc.rpartition(":")[2]
    (parts.path + port).encode("ascii")


def _checked_key(option: str, key: str | None) -> str | None:
    """It goes into a header. The message does not show it."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ServerError(
            f"{option} must be printable ASCII characters, and has others: was it read from a file with "
            "line ends?"
        )
    return key


def _in_words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    words = str(reason) or type(reason).__name__
    return f"{words}: does it speak http, not https?" if "WRONG_VERSION_NUMBER" in words else words


def _word(on: bool) -> str:
    return "on" if on else "off"
