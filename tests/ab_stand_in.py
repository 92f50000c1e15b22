"""An SGLang server that decodes by a clock of its own, with planted gains and faults.

With a :class:`SharedClock` no time passes but what the stand-in lets pass, so that a planted gain is
exact however busy the machine is. With a :class:`WallClock` it sleeps, for a client in another process.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PATIENCE_S = 10


class WallClock:
    """Time as it passes."""

    def __call__(self) -> float:
        return time.perf_counter()

    def expect_reading(self) -> None:
        pass

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)


class SharedClock:
    """Goes on only when the client has read it once for each event sent."""

    def __init__(self) -> None:
        self.now = 0.0
        self.expected = 0
        self.changed = threading.Condition()

    def __call__(self) -> float:
        with self.changed:
            self.expected -= 1
            self.changed.notify_all()
            return self.now

    def expect_reading(self) -> None:
        with self.changed:
            self.expected += 1

    def advance(self, seconds: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.expected <= 0, PATIENCE_S)
            self.now += seconds


class StandIn:
    """A server with the plugin, as an HTTP client sees it.

    Attributes to plant something: ``step_ms`` by who fills, ``prefill_ms`` likewise, ``noise`` as a
    share of each batch's step time, ``steps_per_event`` by who fills, ``at_once`` (requests that it runs
    at once), ``share_of_fewer`` (of the step time, once a request of the batch has ended),
    ``long_steps`` (every fifth step takes so many times as long, by who fills).

    Faults: ``stuck_ranks`` take no switch, ``refuses`` answers the switch with false, ``dies_in_batch``
    is the batch in whose middle it goes away, ``hangs`` answers nothing, ``ignores_switch`` lets the
    plugin fill whatever the switch says, ``aborts`` requests.

    ``verify`` is None, or that role's part of each record. ``falls_back`` in it: SGLang fills that role.
    """

    def __init__(self, clock: Any, ranks: int = 1) -> None:
        self.clock = clock
        self.step_ms = {"on": 10.0, "off": 10.0}
        self.prefill_ms = {"on": 5.0, "off": 5.0}
        self.noise = 0.0
        self.steps_per_event = {"on": 1, "off": 1}
        self.long_steps = {"on": 1.0, "off": 1.0}
        self.at_once = 1_000
        self.share_of_fewer = 1.0
        self.info: dict[str, Any] = {"version": "0.5.17", "speculative_algorithm": "EAGLE"}
        self.records: list[dict[str, Any] | None] = [_record() for _ in range(ranks)]
        self.verify: dict[str, Any] | None = None
        self.api_key: str | None = None
        self.admin_api_key: str | None = None
        self.stuck_ranks: tuple[int, ...] = ()
        self.refuses = self.hangs = self.ignores_switch = self.aborts = self.is_dead = False
        self.dies_in_batch: int | None = None
        self.metrics: str | None = None
        self.redirect: str | None = None
        self.calls: Counter[str] = Counter()
        self.prompts: list[list[int]] = []
        self.switched: list[int] = []
        self.generating = threading.Event()
        self.aborted = threading.Event()
        self.random = random.Random(1)
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"stand_in": self})
        )
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def is_on(self) -> bool:
        return bool(self.records[0] and self.records[0]["switched_on"])

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def server_info(self) -> dict[str, Any]:
        states = [
            {} if each is None else {"nsa_metadata": self._with_roles(each)} for each in self.records
        ]
        return {**self.info, "internal_states": states}

    def _with_roles(self, record: dict[str, Any]) -> dict[str, Any]:
        """As the plugin shows it: what does not lie below "roles" is draft-extend's."""
        verify = {} if self.verify is None else {"verify": self.verify}
        return {**record, "roles": {"draft-extend": record, **verify}}

    def switch(self, body: dict[str, Any]) -> list[bool]:
        on = body["server_args"]["nsa_metadata"]
        self.switched.append(on)
        if not self.refuses:
            for rank, record in enumerate(self.records):
                if record is not None and rank not in self.stuck_ranks:
                    record["switched_on"] = bool(on)
        return [not self.refuses for _ in self.records]

    def count_step(self) -> None:
        for record in self.records:
            assert record is not None
            if record["switched_on"] or self.ignores_switch:
                record["replays"] += 1
            else:
                reason = "switched off in service"
                record["fallbacks"][reason] = record["fallbacks"].get(reason, 0) + 1
        if self.verify is not None:
            self.verify["replays"] += self.is_on and not self.verify["falls_back"]

    def batch(self, body: dict[str, Any]) -> Any:
        """The events of a batch, and the time that passes between them."""
        self.calls["batches"] += 1
        self.prompts += body["input_ids"]
        arm = "on" if self.is_on else "off"
        step_s = self.step_ms[arm] / 1e3 * (1 + self.random.uniform(-self.noise, self.noise))
        limit = body["sampling_params"]["max_new_tokens"]
        waiting = [_Request(number, limit) for number in range(len(body["input_ids"]))]
        running: list[_Request] = []
        number = 0
        while waiting or running:
            while waiting and len(running) < self.at_once:
                self.clock.advance(self.prefill_ms[arm] / 1e3)
                running.append(waiting.pop(0))
                yield running[-1].event(self.aborts)
            is_full = len(running) == len(body["input_ids"])
            number += 1
            times = self.long_steps[arm] if number % 5 == 0 else 1
            self.clock.advance(times * (step_s if is_full else step_s * self.share_of_fewer))
            self.count_step()
            for request in running:
                request.step(self.random)
                if request.steps % self.steps_per_event[arm] == 0 or request.is_done:
                    yield request.event(self.aborts)
            running = [request for request in running if not request.is_done]


class _Request:
    def __init__(self, number: int, limit: int) -> None:
        self.number, self.limit, self.tokens, self.steps = number, limit, 1, 0

    @property
    def is_done(self) -> bool:
        return self.tokens >= self.limit

    def step(self, random: random.Random) -> None:
        self.steps += 1
        self.tokens = min(self.limit, self.tokens + random.randint(1, 4))

    def event(self, aborts: bool) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": f"request-{self.number}",
            "finish_reason": None,
            "completion_tokens": self.tokens,
        }
        if self.is_done:
            reason = {"type": "abort", "message": "out of memory"} if aborts else {"type": "length"}
            meta |= {"finish_reason": reason, "spec_verify_ct": self.steps}
        # A text that looks like what a reader of raw events looks for.
        return {"text": '"id":"no","completion_tokens":7' * self.tokens, "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.stand_in.hangs:
            time.sleep(1)
        if self.stand_in.redirect is not None:
            self.send_response(307)
            self.send_header("Location", self.stand_in.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/metrics" and self.stand_in.metrics is not None:
            self._send(200, self.stand_in.metrics.encode())
        elif self.path == "/server_info":
            self._guarded(self.stand_in.api_key, self.stand_in.server_info)
        else:
            self._send(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/set_internal_state":
            key = self.stand_in.admin_api_key or self.stand_in.api_key
            self._guarded(key, lambda: self.stand_in.switch(body))
        elif self._is_admitted(self.stand_in.api_key):
            self._generate(body)

    def _guarded(self, key: str | None, answer: Any) -> None:
        if self._is_admitted(key):
            self._send(200, json.dumps(answer()).encode())

    def _is_admitted(self, key: str | None) -> bool:
        if self.stand_in.is_dead:
            return False
        if key is not None and self.headers["Authorization"] != f"Bearer {key}":
            self._send(401, b'{"error": "Unauthorized"}')
            return False
        return True

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _generate(self, body: dict[str, Any]) -> None:
        self.wfile.write(HEADER)
        try:
            for number, event in enumerate(self.stand_in.batch(body)):
                if number == 5 and self.stand_in.calls["batches"] == self.stand_in.dies_in_batch:
                    self.stand_in.is_dead = True
                    return
                self.stand_in.clock.expect_reading()
                self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.stand_in.generating.set()
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            self.stand_in.aborted.set()


def _record() -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "adapter": "in_graph",
        "backend": "cuda",
        "reason": "auto: compiled for this GPU",
        "switched_on": True,
        "replays": 0,
        "launches": 0,
        "fallbacks": {},
    }
