"""An SGLang plugin that can launch empty kernels with programmatic launch before each graph replay.

In a scheduler process it wraps ``torch.cuda.CUDAGraph.replay``. While ``$NOOP_PROBE_DIR/ask`` says
``{"id": N, "before": NAME, "only_deepest": BOOL, "coarse_fence": BOOL}``, each replay is preceded by
what :func:`preludes` has under that name; or only those of the graph that takes longest to launch,
which is target-verify's. With the coarse fence SGLang's scheduler waits for the whole forward before it
writes what the forward may read, whatever event was published: SGLang has a variable for that, which it
asks in every step. A new request is answered in ``$NOOP_PROBE_DIR/done`` with the times between replays
of the graph that was replayed most often since the request before, which are the times of speculative
steps.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[], object]
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
COARSE_FENCE = "SGLANG_FORCE_COARSE_WAR_BARRIER"
POLL_S = 0.005

before = "nothing"
only_deepest = False
replays: dict[int, list[int]] = {}  # id of a graph: when it was replayed, ns
launch_ns: dict[int, int] = {}  # id of a graph: how long its last launch took


def register() -> None:
    if SCHEDULER_MODULE not in sys.modules or not os.environ.get("NOOP_PROBE_DIR"):
        return
    import torch

    original = torch.cuda.CUDAGraph.replay
    made: dict[str, Call] = {}

    def replay(graph: Any) -> None:
        if before != "nothing" and not (only_deepest and is_shallow(id(graph))):
            if not made:
                made.update(preludes(original))
            made[before]()
        begin = time.perf_counter_ns()
        original(graph)
        end = time.perf_counter_ns()
        launch_ns[id(graph)] = end - begin
        replays.setdefault(id(graph), []).append(end)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[assignment,method-assign]
    threading.Thread(target=follow, args=(Path(os.environ["NOOP_PROBE_DIR"]),), daemon=True).start()


def is_shallow(graph: int) -> bool:
    """Whether another graph takes longer to launch."""
    return launch_ns.get(graph, 0) < max(launch_ns.values(), default=0)


def preludes(replay: Callable[[Any], None]) -> dict[str, Call]:
    """What can be launched before a replay; nothing of it writes."""
    import torch

    launch = empty_kernel()
    forked = torch.cuda.CUDAGraph()
    launch()  # compiles
    side = torch.cuda.Stream()
    with torch.cuda.graph(forked, capture_error_mode="thread_local"):
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            launch()
        launch()
        main.wait_stream(side)
    return {
        "no-op": launch,
        "8 no-ops": lambda: [launch() for _ in range(8)],
        "forked graph": lambda: replay(forked),
    }


def empty_kernel() -> Call:
    """A call that launches a kernel that does nothing, programmatically."""
    import triton
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit  # type: ignore[untyped-decorator]
    def nothing() -> None:
        gdc_wait()
        gdc_launch_dependents()

    return lambda: nothing[(1,)](num_warps=1, launch_pdl=True)


def follow(folder: Path) -> None:
    """Takes requests until the process ends."""
    answered = None
    while True:
        answered = take(folder, answered)
        time.sleep(POLL_S)


def take(folder: Path, answered: int | None) -> int | None:
    """Does what is asked and answers, if it has not been answered; the id of the last answer."""
    global before, only_deepest
    path = folder / "ask"
    asked = json.loads(path.read_text()) if path.is_file() else None
    if asked is None or asked["id"] == answered:
        return answered
    before, only_deepest = asked["before"], asked["only_deepest"]
    os.environ[COARSE_FENCE] = str(int(asked["coarse_fence"]))
    times = max(replays.values(), key=len, default=[])
    gaps = [(after - before) / 1000 for before, after in itertools.pairwise(times)]
    graphs = sorted((len(each) for each in replays.values()), reverse=True)
    replays.clear()
    launch_ns.clear()
    answer(folder, {"id": asked["id"], "gaps_us": gaps, "graphs": graphs})
    return int(asked["id"])


def answer(folder: Path, found: dict[str, Any]) -> None:
    new = folder / "done.new"
    new.write_text(json.dumps(found))
    new.replace(folder / "done")
