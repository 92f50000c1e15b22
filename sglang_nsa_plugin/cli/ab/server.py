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
import urllib.request
from collections.abc import Iterator
from typing import Any

KEY = "nsa_metadata"  # in a rank's internal state, and in a request to switch
SWITCH_PATH = "/set_internal_state"
ANSWER_S = 60  # for the longest pause of an answer: a rank answers between two of its steps
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
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.api_key = api_key
        self.admin_api_key = admin_api_key

    def info(self) -> dict[str, Any]:
        """``GET /server_info``."""
        found = self._json("/server_info")
        if not isinstance(found, dict) or not isinstance(found.get("internal_states"), list):
            raise ServerError(f"{self.url}/server_info has no internal_states: this is no SGLang server")
        return found

    def records(self) -> list[Record]:
        """The plugin's record of each rank that ``/server_info`` shows."""
        return [state.get(KEY, {}) for state in self.info()["internal_states"]]

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
            try:
                return json.load(response)
            except (ValueError, *NO_ANSWER) as error:
                raise ServerError(f"{self.url}{path} answered no JSON: {_in_words(error)}") from error

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
            return _OPENER.open(request, timeout=limit_s or ANSWER_S)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.url}{path} answered {_refusal(error)}") from error
        except NO_ANSWER as error:
            raise ServerError(f"no answer from {self.url}{path}: {_in_words(error)}") from error


@contextlib.contextmanager
def left_as_found(server: Server, found_on: bool) -> Iterator[None]:
    """Switches back at the end, also after an error, Ctrl-C, SIGTERM or the end of the terminal.

    Where that fails the message on standard error has the command that does it by hand.
    """
    with _signals_as_exit(signal.SIGTERM, signal.SIGHUP):
        try:
            yield
        finally:
            _switch_back(server, found_on)


def _switch_back(server: Server, on: bool) -> None:
    why, done = "interrupted", False
    try:
        for pause_s in (*PAUSES_S, None):
            try:
                if any(record.get("switched_on") is not on for record in server.records()):
                    server.switch(on)
                done = True
                return
            except ServerError as error:
                why = str(error)
            if pause_s is not None:
                time.sleep(pause_s)
    finally:
        if not done:
            print(
                f"sglang-nsa-plugin ab: could not switch the plugin {_word(on)} again, as it was found "
                f"({why}). If the server still runs, do it by hand:\n    {server.curl(on)}",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def _signals_as_exit(*signals: signal.Signals) -> Iterator[None]:
    """These signals raise SystemExit, so that ``finally`` runs."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return (
            f"HTTP {error.code}: it wants a key. Pass --api-key, and --admin-api-key if the server was "
            "started with one"
        )
    text = " ".join(error.read(2000).decode(errors="replace").split())
    return f"HTTP {error.code}: {text[:300] or error.reason}"


def _in_words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _word(on: bool) -> str:
    return "on" if on else "off"
