"""A second SGLang plugin that only measures: host time around each draft-extend replay.

With this folder on PYTHONPATH, SGLang finds the entry point ``probe``. The probe works the same
with and without sglang-nsa-plugin, so both servers of a comparison are timed by the same code. Each
process that loads plugins writes ``$NSA_PROBE_DIR/<pid>.json``; without that variable the probe
does nothing.

In a scheduler process the draft-extend runner is watched from the end of its ``__init__``, so that
captures are not timed. Two spans are taken, in nanoseconds of ``time.perf_counter_ns``:

- fill: one call of ``draft_extend_attn_backend.init_forward_metadata_out_graph`` inside
  ``execute``; SGLang fills the metadata there, sglang-nsa-plugin only points at it.
- before_replay: from entering ``execute`` to entering ``_replay_graph``.

It also counts the distinct events that ``execute`` publishes for the scheduler to wait on: SGLang makes
a new one for each replay, a graph records the same one again.

The runners of the other two plans, target-verify and draft-decode, are watched in the same way, but only
their metadata is timed and their replays counted. Their figures lie below ``roles``, and so do those of
plain decode, which a server without speculation has alone.

SGLang 0.5.14 and before runs draft-extend without a graph: there only fill is taken, one call of
``init_forward_metadata`` for a draft-extend batch.

``NSA_PROBE_LEAST`` replaces the fill before a replay by the least that a hook can do: inside the wrapper
of SGLang's registry, a function that points the backend at its captured metadata and checks nothing. For
servers with the plugin, whose graphs hold the fill.

``NSA_PROBE_MARK`` names these calls in SGLang's profiles, ``nsa-probe metadata ROLE``. It costs time.

``NSA_PROBE_CORRUPT`` names fields of SGLang's metadata, separated by commas, that can be corrupted; a
role and a colon before a field mean that role's, a field alone draft-extend's. Each captured fill of
sglang-nsa-plugin is then followed by one more step for each field. It works while the field is named in
``$NSA_PROBE_DIR/corrupt`` and the fill is switched on: it halves lengths and running sums, and points
page tables to page 0. ``$NSA_PROBE_DIR/corrupted`` names the fields that are corrupted now. Indices stay
inside their tensors, so that a corrupted tensor shows in what the server answers.

A field with ``=-1`` behind it gets -1 everywhere, which is no page and no slot. That is for tables that
nothing should read. Where the metadata has no such table, because it was left out, it gets one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

WORKER = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker"
RUNNER = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"
# Since 0.5.14 these two have a backend of graphs with a method replay(key, batch).
VERIFY_MODULE = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
VERIFY_RUNNER = f"{VERIFY_MODULE}.DecodeCudaGraphRunner"
DRAFT_RUNNER = "sglang.srt.speculative.eagle_draft_cuda_graph_runner.EAGLEDraftCudaGraphRunner"
DRAFT_EXTEND, DRAFT_DECODE, VERIFY, DECODE = "draft-extend", "draft-decode", "verify", "decode"
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
PLUGIN_MODULE = "sglang_nsa_plugin.plugin"
STATE_MODULE = "sglang_nsa_plugin.state"
FENCE_EVENTS = ("shared_read_done_event", "war_fastpath_read_done_event")
WRITE_EVERY_S = 0.5
FIRST_SAMPLES = 5
SWITCH_EVERY_S = 0.1

clock = time.perf_counter_ns


def register() -> None:
    """Called by SGLang's plugin loader.

    A spawned scheduler has imported its own module before it loads plugins; the launcher has not.
    There the hook is left out, because applying it imports the runner's module, which costs the
    launcher seconds and needs GPU libraries that it does without.
    """
    folder = os.environ.get("NSA_PROBE_DIR")
    if not folder:
        return
    path = Path(folder) / f"{os.getpid()}.json"
    if SCHEDULER_MODULE not in sys.modules:
        _write(path, _process("launcher"))
        return
    _write(path, _process("scheduler"))

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def watch(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
        original(runner, *args, **kwargs)
        Watch(runner, path)

    def watch_eager(original: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
        original(worker, *args, **kwargs)
        if not getattr(worker, "cuda_graph_runner_for_draft_extend", None):
            EagerWatch(worker.draft_runner.attn_backend, path)

    def watch_verify(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
        original(runner, *args, **kwargs)
        if runner.model_runner.is_draft_worker:
            return
        if runner.model_runner.spec_algorithm.is_none():
            decode = RoleWatch(DECODE, runner, runner.attn_backend)
            _write_when_quiet(path, decode.fill_ns, decode.of_process)
        else:
            RoleWatch(VERIFY, runner, runner.attn_backend)

    def watch_draft(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
        original(runner, *args, **kwargs)
        RoleWatch(DRAFT_DECODE, runner, runner.draft_attn_backend)

    fields = os.environ.get("NSA_PROBE_CORRUPT")
    if fields:
        Corruption(fields.split(","), Path(folder)).install()
    HookRegistry.register(f"{RUNNER}.__init__", watch, HookType.AROUND)
    if _exists(VERIFY_MODULE):
        HookRegistry.register(f"{VERIFY_RUNNER}.__init__", watch_verify, HookType.AROUND)
        HookRegistry.register(f"{DRAFT_RUNNER}.__init__", watch_draft, HookType.AROUND)
    HookRegistry.register(f"{WORKER}.init_cuda_graphs", watch_eager, HookType.AROUND)


class Corruption:
    """Corrupts tensors after each captured fill; a file names them while the server runs."""

    def __init__(self, fields: list[str], folder: Path) -> None:
        self.fields = fields
        self.asked = folder / "corrupt"
        self.done = folder / "corrupted"
        self.switches: Any = None  # int32 [fields] on the device, 1 where a field is wrong now

    def install(self) -> None:
        from sglang_nsa_plugin.adapters.captured_fill import BackendFills

        refresh_derived = BackendFills.refresh_derived

        def wrong(fill: Any, metadata: Any) -> None:
            self.spoil(fill, metadata)
            refresh_derived(fill, metadata)

        BackendFills.refresh_derived = wrong  # type: ignore[assignment, method-assign]

    def spoil(self, fill: Any, metadata: Any) -> None:
        """Enqueues the wrong numbers. SGLang first calls it in a warm-up, before any capture."""
        if self.switches is None:
            self.switches = fill.enabled.new_zeros(len(self.fields))
            threading.Thread(target=self._follow, name="nsa-corruption", daemon=True).start()
        for number, name in enumerate(self.fields):
            role, field, is_stand_in = parsed(name)
            if role == fill.role.name:
                on = self.switches[number] * fill.enabled
                if is_stand_in:
                    give_stand_in(fill, metadata, field)
                _spoil(metadata, field, on, is_stand_in)

    def _follow(self) -> None:
        """Sets the switches to what the file asks for; touches the device only when that changes."""
        now = None
        while True:
            asked = self.asked.read_text() if self.asked.is_file() else None
            if asked is not None and asked != now:
                for number, field in enumerate(self.fields):
                    self.switches[number].fill_(int(field in asked.split(",")))
                self._wait()
                self.done.write_text(asked)
                now = asked
            time.sleep(SWITCH_EVERY_S)

    def _wait(self) -> None:
        if self.switches.is_cuda:
            import torch

            torch.cuda.synchronize()


def parsed(name: str) -> tuple[str, str, bool]:
    """Role and field of a name in ``NSA_PROBE_CORRUPT``, and whether it gets -1."""
    role, _, field = name.rpartition(":")
    return role or DRAFT_EXTEND, field.removesuffix("=-1"), field.endswith("=-1")


STAND_INS: set[str] = set()  # roles whose metadata was given a table


def give_stand_in(fill: Any, metadata: Any, field: str) -> None:
    """Gives the metadata a table of -1 where that one was left out; as wide as SGLang makes it."""
    if getattr(metadata, field) is None:
        rows, width = metadata.dsa_cache_seqlens_int32.shape[0], fill.backend.req_to_token.shape[1]
        table = fill.enabled.new_full((rows, width), -1)
        object.__setattr__(metadata, field, table)
        STAND_INS.add(fill.role.name)


def _spoil(metadata: Any, field: str, on: Any, is_stand_in: bool) -> None:
    """Makes a tensor wrong where ``on``, a number on the device, is 1."""
    tensor = getattr(metadata, field)
    assert tensor is not None, f"{field}: is not there to be made wrong"
    if is_stand_in:
        tensor.mul_(1 - on).sub_(on)
    elif tensor.dim() == 1:
        tensor.sub_(tensor // 2 * on)
    else:
        tensor.mul_(1 - on)


def marked(role: str, fill: Callable[..., Any]) -> Callable[..., Any]:
    """With ``NSA_PROBE_MARK``, the same call below a name that a profile shows."""
    if not os.environ.get("NSA_PROBE_MARK"):
        return fill
    from torch.profiler import record_function

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"nsa-probe metadata {role}"):
            return fill(*args, **kwargs)

    return named


def timed(call: Callable[..., Any], samples_ns: list[int]) -> Callable[..., Any]:
    """The same call, whose time is appended to the samples."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = clock()
        result = call(*args, **kwargs)
        samples_ns.append(clock() - begin)
        return result

    return measured


class RoleWatch:
    """Times the metadata of a runner other than draft-extend's and counts its replays."""

    all: ClassVar[dict[str, RoleWatch]] = {}

    def __init__(self, role: str, runner: Any, backend: Any) -> None:
        self.capture_bs = [int(size) for size in runner.capture_bs]
        self.fill_ns: list[int] = []
        self.replays: Counter[int] = Counter()
        self._time_fill(role, backend)
        self._count_replays(runner.backend)
        self.all[role] = self

    def _time_fill(self, role: str, backend: Any) -> None:
        fill = marked(role, backend.init_forward_metadata_out_graph)
        backend.init_forward_metadata_out_graph = timed(fill, self.fill_ns)

    def _count_replays(self, graphs: Any) -> None:
        replay = graphs.replay

        def counted(key: Any, *args: Any, **kwargs: Any) -> Any:
            self.replays[key.size] += 1
            return replay(key, *args, **kwargs)

        graphs.replay = counted

    def figures(self) -> dict[str, Any]:
        return {
            "capture_bs": self.capture_bs,
            "replays": sum(self.replays.values()),
            "replays_by_batch_size": {str(bs): n for bs, n in sorted(self.replays.items())},
            "fill_us": summary(self.fill_ns),
        }

    def of_process(self) -> dict[str, Any]:
        """The figures of a scheduler that has this runner alone."""
        return {
            **_process("scheduler"),
            "fill_us": summary(self.fill_ns),
            "roles": {role: watch.figures() for role, watch in self.all.items()},
            "plugin_record": _plugin_record(),
        }


class EagerWatch:
    """Times the draft-extend metadata of one backend and writes the figures from a thread of its own."""

    def __init__(self, backend: Any, path: Path) -> None:
        self.fill_ns: list[int] = []
        fill = backend.init_forward_metadata

        def timed(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            begin = clock()
            result = fill(forward_batch, *args, **kwargs)
            spent = clock() - begin
            if forward_batch.forward_mode.is_draft_extend_v2():
                self.fill_ns.append(spent)
            return result

        backend.init_forward_metadata = timed
        _write_when_quiet(path, self.fill_ns, self.figures)

    def figures(self) -> dict[str, Any]:
        return {
            **_process("scheduler"),
            "fills": len(self.fill_ns),
            "fill_us": summary(self.fill_ns),
            "roles": {role: watch.figures() for role, watch in RoleWatch.all.items()},
            "plugin_record": _plugin_record(),
        }


class Watch:
    """Times one runner and writes the figures from a thread of its own."""

    def __init__(self, runner: Any, path: Path) -> None:
        self.capture_bs = [int(size) for size in runner.capture_bs]
        self.fill_ns: list[int] = []
        self.before_replay_ns: list[int] = []
        self.replays: Counter[int] = Counter()
        self.fences: dict[int, Any] = {}  # by identity; holding them keeps identities apart
        self.entered = 0
        self.executing = False
        if os.environ.get("NSA_PROBE_LEAST"):
            do_the_least(runner.draft_extend_attn_backend)
        self._time_fill(runner.draft_extend_attn_backend)
        self._time_execute(runner)
        self._time_replay(runner)
        _write_when_quiet(path, self.before_replay_ns, self.figures)

    def _time_fill(self, backend: Any) -> None:
        fill = marked(DRAFT_EXTEND, backend.init_forward_metadata_out_graph)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = clock()
            result = fill(*args, **kwargs)
            spent = clock() - begin
            if self.executing:
                self.fill_ns.append(spent)
            return result

        backend.init_forward_metadata_out_graph = timed

    def _time_execute(self, runner: Any) -> None:
        execute = runner.execute

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.executing = True
            self.entered = clock()
            try:
                output = execute(*args, **kwargs)
            finally:
                self.executing = False
            self._keep_fence(runner.model_runner)
            return output

        runner.execute = timed

    def _keep_fence(self, model_runner: Any) -> None:
        event = next(getattr(model_runner, name) for name in FENCE_EVENTS if hasattr(model_runner, name))
        if event is not None:  # since 0.5.22 SGLang publishes none for DSA
            self.fences[id(event)] = event

    def _time_replay(self, runner: Any) -> None:
        replay = runner._replay_graph

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.before_replay_ns.append(clock() - self.entered)
            self.replays[runner.bs] += 1
            return replay(*args, **kwargs)

        runner._replay_graph = timed

    def figures(self) -> dict[str, Any]:
        return {
            **_process("scheduler"),
            "capture_bs": self.capture_bs,
            "replays": len(self.before_replay_ns),
            "replays_by_batch_size": {str(bs): n for bs, n in sorted(self.replays.items())},
            "distinct_fences": len(self.fences),
            "fill_us": summary(self.fill_ns),
            "before_replay_us": summary(self.before_replay_ns),
            "roles": {role: watch.figures() for role, watch in RoleWatch.all.items()},
            "stand_ins": sorted(STAND_INS),
            "plugin_record": _plugin_record(),
        }


def do_the_least(backend: Any) -> None:
    """From now on replays of this backend only point it at its captured metadata."""
    from sglang.srt.plugins import hook_registry

    def point(original: Callable[..., Any], backend: Any, forward_batch: Any) -> None:
        backend.forward_metadata = backend.decode_cuda_graph_metadata[forward_batch.batch_size]

    original = type(backend).init_forward_metadata_out_graph
    hooked = hook_registry._wrap_fn(original, point, hook_registry.HookType.AROUND)
    backend.init_forward_metadata_out_graph = types.MethodType(hooked, backend)


def _write_when_quiet(path: Path, samples: list[int], figures: Callable[[], dict[str, Any]]) -> None:
    """Writes after each pause of the steps, in a thread: sorting beside them would slow them down."""

    def watch() -> None:
        written, seen = -1, -1
        while True:
            count = len(samples)
            if count == seen and count != written:
                _write(path, figures())
                written = count
            seen = count
            time.sleep(WRITE_EVERY_S)

    threading.Thread(target=watch, name="nsa-probe", daemon=True).start()


def summary(samples_ns: list[int]) -> dict[str, Any]:
    """Count, mean, median, 10th and 90th percentile, greatest and first samples in microseconds."""
    spans = [span / 1000 for span in samples_ns]
    if len(spans) < 2:
        return {"count": len(spans), "first": spans}
    tenths = statistics.quantiles(spans, n=10)
    return {
        "count": len(spans),
        "median": round(statistics.median(spans), 3),
        "p10": round(tenths[0], 3),
        "p90": round(tenths[-1], 3),
        "mean": round(statistics.fmean(spans), 3),
        "max": round(max(spans), 3),
        "first": [round(span, 3) for span in spans[:FIRST_SAMPLES]],
    }


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def _process(role: str) -> dict[str, Any]:
    """SGLang imports all plugins of a process before it runs the first, in whatever order."""
    return {
        "pid": os.getpid(),
        "role": role,
        "argv": sys.argv,
        "plugin_loaded": PLUGIN_MODULE in sys.modules,
        "written_at": time.time(),
    }


def _plugin_record() -> dict[str, Any] | None:
    state = sys.modules.get(STATE_MODULE)
    return None if state is None else state.record()


def _write(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(temporary, path)
