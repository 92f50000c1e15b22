"""Answers as an SGLang server with the plugin and the probe would, without a model.

With tests/stand_in on PYTHONPATH the serving tests start this in SGLang's place, so that their own code
is run on a machine without a GPU. STAND_IN_FAULT makes the server with the plugin wrong in one way.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

READ = ("dsa_seqlens_expanded", "dsa_cache_seqlens_int32", "real_page_table")
STAND_IN = "page_table_1=-1"  # which SGLang's older top-k reads
READS_WIDE = os.environ.get("SGLANG_OPT_USE_TOPK_V2") == "0"
VOCAB = 4_000
STEP_S = 0.002
PATCHED = "another plugin (first) patched sglang.srt.managers.scheduler.Scheduler.__init__ before"


def option(name: str, default: str) -> str:
    """The last value of a server option."""
    found = [sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word == name]
    return found[-1] if found else default


SPECULATES = "--speculative-algorithm" in sys.argv
DECODE = "decode"  # what a server fills that does not
DEFAULT_ROLES = "draft-extend,draft-decode,verify" if SPECULATES else "draft-extend"


class State:
    has_plugin = os.environ.get("SGLANG_PLUGINS") != "probe"
    fault = os.environ.get("STAND_IN_FAULT", "") if has_plugin else ""
    wrong_role = os.environ.get("STAND_IN_ROLE")  # whose record shows the fault; unset, each role's
    context = int(option("--context-length", "163840"))
    draft_tokens = int(option("--speculative-num-draft-tokens", "4" if SPECULATES else "1"))
    ranks = int(option("--tp", "1"))
    schedulers = int(option("--attn-dp-size", option("--dp", "1")))
    graphs = "--disable-cuda-graph" not in sys.argv
    is_patched = has_plugin and "first_plugin" in os.environ["PYTHONPATH"]
    model = option("--model-path", "")
    folder = os.environ.get("NSA_PROBE_DIR")
    mib = Path(os.environ["STAND_IN_DIR"]) / f"{os.getpid()}.mib"
    releases = 0  # of memory
    lock = threading.Lock()
    cached: ClassVar[list[list[int]]] = []
    aborted: ClassVar[set[str]] = set()
    replays = 0
    sampled = 0
    switched_on = True
    switched_off = 0  # steps that SGLang filled meanwhile
    roles = (os.environ.get("SGLANG_NSA_METADATA_ROLES") or DEFAULT_ROLES).split(",")


def wrong_now() -> set[str]:
    """The roles with a wrong tensor that something reads, by the file of the corruption."""
    path = Path(State.folder or "/nonexistent") / "corrupt"
    asked = path.read_text().split(",") if path.is_file() else []
    read = {*READ, STAND_IN} if READS_WIDE else READ
    names = [name.rpartition(":") for name in asked]
    return {role or "draft-extend" for role, _, field in names if field in read}


def tokens(prompt: list[int], count: int, temperature: float) -> list[int]:
    with State.lock:
        State.sampled += temperature > 0
        salt = f"{State.sampled if temperature > 0 else 0} {Path(State.model).name}"
    seed = hashlib.sha256(f"{salt} {prompt}".encode()).digest()
    return [(seed[i % 32] * 31 + seed[(i // 32) % 32] + i) % VOCAB for i in range(count)]


def accepted(count: int) -> list[int]:
    """Steps by accepted drafts: one step for each count in turn until the tokens are there."""
    steps, made = [0] * State.draft_tokens, 1
    drafts = 0
    while made < count:
        steps[drafts] += 1
        made += drafts + 1
        drafts = (drafts + 1) % State.draft_tokens
    return steps


def answer(prompt: list[int], parameters: dict, rid: str) -> dict:
    room = State.context - len(prompt) - 2
    asked = parameters["max_new_tokens"]
    count = room if asked is None else min(asked, room)
    made = tokens(prompt, count, parameters["temperature"])
    steps = accepted(count)
    finish = {"type": "length", "length": count}
    for done in range(0, count, 3):
        time.sleep(STEP_S)
        if rid in State.aborted:
            made, finish = made[: done + 1], {"type": "abort", "message": "Aborted"}
            break
    wrong = wrong_now()
    if (State.fault == "tokens" or wrong & {"verify", DECODE}) and len(made) > 3:
        made[3] += 1
    if State.fault == "drafts" or wrong:
        steps[0] += 2
    with State.lock:
        shared = max((common(prompt, other) for other in State.cached), default=0)
        State.cached.append(prompt)
        count_steps(sum(steps))
    meta = {"finish_reason": finish, "cached_tokens": shared // 64 * 64}
    if SPECULATES:
        meta |= {"spec_verify_ct": sum(steps), "spec_accept_histogram": steps}
    return {"output_ids": made, "meta_info": meta}


def count_steps(steps: int) -> None:
    """By whoever fills them."""
    if State.switched_on:
        State.replays += steps
    else:
        State.switched_off += steps


def events(prompts: list[list[int]], limit: int) -> Iterator[dict]:
    """A batch of requests, 4 tokens a step: an event of each after the prefill and after every step."""
    rids = [f"{id(prompts)}-{number}" for number in range(len(prompts))]
    for made in range(1, limit + 4, 4):
        is_done = made >= limit
        meta = {"finish_reason": {"type": "length"} if is_done else None, "completion_tokens": made}
        for rid in rids:
            yield {"meta_info": {"id": rid, **meta, "spec_verify_ct": made // 4}}
        if is_done:
            return
        time.sleep(STEP_S)
        count_steps(1)


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))  # noqa: B905


def why_not(role: str = "draft-extend") -> str | None:
    """Why the plugin does not fill this role in this server, or None."""
    if SPECULATES is (role == DECODE):
        return "with speculation" if SPECULATES else "without speculation"
    if State.is_patched:
        return PATCHED
    return None if State.graphs else "no graph (CUDA graphs disabled)"


def record(pid: int) -> dict:
    first = role_record("draft-extend")
    roles = {role: first if role == "draft-extend" else role_record(role) for role in State.roles}
    return {
        "version": "0",
        **first,
        "in_place": {
            role: why_not(role) is None for role in dict.fromkeys(("draft-extend", *State.roles))
        },
        "roles": roles,
        "tree_mask": "short while the plugin fills verify",
        "pid": pid,
    }


def role_record(role: str) -> dict:
    why_idle = why_not(role)
    checks = State.replays if os.environ.get("SGLANG_NSA_METADATA_CHECK") == "1" else 0
    checks -= State.releases if checks and role != "draft-extend" else 0  # the replay before is left out
    is_wrong = State.wrong_role in (None, role)
    off = {"switched off in service": State.switched_off} if State.switched_off else {}
    return {
        "adapter": None if why_idle else "in-graph",
        "backend": None if why_idle else "cuda",
        "mqa_schedule": "cuda",
        "reason": why_idle or "stand-in",
        "captures": [] if why_idle else [1, 2],
        "replays": 0 if why_idle else State.replays,
        "launches": 0,
        "checks": checks,
        "values_checked": 1000 * checks,
        "mismatches": int(State.fault == "mismatch" and is_wrong),
        "fallbacks": {"planted": 1} if State.fault == "fallback" and is_wrong else off,
        "switched_on": State.switched_on,
        "in_place": why_idle is None,
        "bytes_saved": 0,
    }


def probe() -> None:
    """Keeps the probe's files up to date, one for each rank, and says what is wrong."""
    while True:
        folder = Path(State.folder or "")
        for rank in range(State.ranks):
            pid = os.getpid() + rank
            of_runner = {"capture_bs": [1, 2], "replays": State.replays, "fill_us": {}}
            of_runner["replays_by_batch_size"] = {"1": State.replays}
            figures = {"pid": pid, "role": "scheduler", **of_runner, "plugin_record": record(pid)}
            figures["stand_ins"] = [] if READS_WIDE else sorted(State.roles)
            roles = ("verify", "draft-decode") if SPECULATES else (DECODE,)
            figures["roles"] = dict.fromkeys(roles, of_runner)
            temporary = folder / f"{pid}.tmp"
            temporary.write_text(json.dumps(figures))
            temporary.replace(folder / f"{pid}.json")
        if (folder / "corrupt").is_file():
            (folder / "corrupted").write_text((folder / "corrupt").read_text())
        time.sleep(0.1)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        states = [{"nsa_metadata": record(os.getpid())} if State.has_plugin else {}]
        info = {"version": "0", "speculative_algorithm": "EAGLE"}
        self.reply({**info, "internal_states": states * State.schedulers})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        getattr(self, self.path.strip("/").replace("/", "_"))(body)

    def set_internal_state(self, body: dict) -> None:
        State.switched_on = bool(body["server_args"]["nsa_metadata"])
        self.reply([True])

    def stream(self, body: dict) -> None:
        many = isinstance(body["input_ids"][0], list)
        prompts = body["input_ids"] if many else [body["input_ids"]]
        self.send_response(200)
        self.end_headers()
        try:
            for event in events(prompts, body["sampling_params"]["max_new_tokens"]):
                self.wfile.write(b"data: %b\n\n" % json.dumps(event).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has left

    def generate(self, body: dict) -> None:
        if body.get("stream"):
            self.stream(body)
            return
        many = isinstance(body["input_ids"][0], list)
        asked = body["input_ids"] if many else [body["input_ids"]]
        parameters = body["sampling_params"] if many else [body["sampling_params"]]
        for prompt, each in zip(asked, parameters):  # noqa: B905
            if len(prompt) + (each["max_new_tokens"] or 0) + 4 > State.context:
                self.reply({"error": {"message": "too long"}}, 400)
                return
        rid = body.get("rid", "")
        answers = [answer(*both, rid) for both in zip(asked, parameters)]  # noqa: B905
        self.reply(answers if many else answers[0])

    def flush_cache(self, body: dict) -> None:
        State.cached.clear()
        self.reply({})

    def abort_request(self, body: dict) -> None:
        State.aborted.add(body["rid"])
        self.reply({})

    def release_memory_occupation(self, body: dict) -> None:
        State.releases += 1
        State.mib.write_text("100\n")
        self.reply(None)

    def resume_memory_occupation(self, body: dict) -> None:
        State.mib.write_text("1000\n")
        self.reply(None)

    def update_weights_from_disk(self, body: dict) -> None:
        if body.get("recapture_cuda_graph"):
            print("RuntimeError: This should not happen", flush=True)
            os._exit(1)
        State.model = body["model_path"]
        self.reply({"message": "loaded"})

    def v1_completions(self, body: dict) -> None:
        if body.get("stream"):
            self.text("data: {}\n\ndata: [DONE]\n\n")
            return
        self.reply({"choices": [{"text": "x"}], "usage": {"completion_tokens": body["max_tokens"]}})

    def v1_chat_completions(self, body: dict) -> None:
        self.reply({"choices": [{"message": {"content": "x"}}], "usage": {}})

    def reply(self, content: object, status: int = 200) -> None:
        self.text(json.dumps(content), status)

    def text(self, content: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if State.is_patched:
        if option("--nsa-metadata-backend", "auto") != "auto":
            sys.exit(f"sglang-nsa-plugin: --nsa-metadata-backend cuda cannot run: {PATCHED}")
        print(f"[stand-in] sglang-nsa-plugin 0: not used: {PATCHED}", flush=True)
    State.mib.write_text("1000\n")
    if State.folder:
        threading.Thread(target=probe, daemon=True).start()
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", int(option("--port", "0"))), Handler).serve_forever()
