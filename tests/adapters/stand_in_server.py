"""A server without a model: SGLang's own launcher steps, plugin loader and scheduler process.

Only the scheduler's constructor and its event loop are stand-ins. Launcher and scheduler are processes
of their own, which load plugins each for itself, as in a server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from isolated import run

from sglang_nsa_plugin.options import ROLES_VARIABLE
from sglang_nsa_plugin.state import DRAFT_EXTEND

# In a scheduler's constructor: the draft worker's backend, and a capture for one request.
MAKE_BACKEND = """
import torch
from sglang_nsa_plugin.harness.installed import pair_for_installed
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
self.pair = pair_for_installed(device, [1], "torch", context_len=256, pool_size=4)
"""
DSA = {"speculative_algorithm": "EAGLE", "attention_backend": "dsa"}
OTHER = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def register():
    for target in {targets!r}:
        HookRegistry.register(target, lambda original, *a, **k: original(*a, **k), HookType.AROUND)
    HookRegistry.apply_hooks()
"""
LOAD = """
import json, logging, os, pickle, signal, sys
from pathlib import Path
start = json.loads(sys.argv[1])
for folder in start["first"]:
    sys.path.insert(0, folder)
sys.path.extend(start["last"])
from sglang.srt.plugins import load_plugins
"""
LAUNCHER = (
    LOAD
    + """
import argparse
from sglang.srt.server_args import ServerArgs
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = parser.parse_args(["--model-path", "dummy", *start["flags"]])
server_args = ServerArgs.from_cli_args(arguments)
handed = {name: value for name, value in os.environ.items() if name.startswith("SGLANG_NSA_")}
Path(start["handed"]).write_bytes(pickle.dumps((server_args, handed)))
"""
)
SCHEDULER = (
    LOAD
    + """
import inspect
from types import SimpleNamespace
import sglang.srt.managers.scheduler as module

def make(self, server_args, *args, **kwargs):
    self.server_args = server_args
    self.gracefully_exit, self.async_d2h_worker = False, None
    self.metrics_reporter = SimpleNamespace(_shutdown_fpm=lambda: None)
    exec(start["change"])

def serve(self):
    from sglang_nsa_plugin.state import record
    output = SimpleNamespace(internal_state={})
    print("record " + json.dumps(record()), flush=True)

module.Scheduler.__init__ = make
module.Scheduler.get_init_info = lambda self: {}
module.Scheduler.run_event_loop = serve
server_args, handed = pickle.loads(Path(start["handed"]).read_bytes())
os.environ.update(handed)
vars(server_args).update(start["settings"])
# Where releases from 0.5.19 on keep what they decided; a model's configuration would bring it there.
decided = [*(getattr(server_args, "_resolved_overrides", None) or ()), ("stand-in", start["settings"])]
vars(server_args)["_resolved_overrides"] = decided
failures = []
signal.signal(signal.SIGQUIT, lambda *_: failures.append(1))  # a failed scheduler tells its launcher
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(len(failures) or os.waitstatus_to_exitcode(status))
module.load_plugins()
exec(start["after_loading"])
given = {"server_args": server_args, "port_args": None, "dp_rank": None,
         "pipe_writer": SimpleNamespace(send=lambda info: print("ready", flush=True))}
names = inspect.signature(module.run_scheduler_process).parameters.values()
given |= {p.name: 0 for p in names if p.name not in given and p.default is p.empty}
module.run_scheduler_process(**given)
"""
)


@dataclass(frozen=True)
class Started:
    """What became of a server: its log, and the scheduler's record; None where it never served."""

    returncode: int
    log: str
    record: dict | None
    is_ready: bool

    def lines(self, part: str) -> list[str]:
        return [line for line in self.log.splitlines() if part in line]


def other_plugin(folder: Path, *targets: str) -> str:
    """Makes a distribution whose plugin hooks these targets and applies hooks itself."""
    (folder / "other_plugin.py").write_text(OTHER.format(targets=targets))
    info = folder / "other_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nother = other_plugin:register\n")
    return str(folder)


def start(
    folder: Path,
    *flags: str,
    first: tuple[str, ...] = (),
    last: tuple[str, ...] = (),
    change: str = "pass",
    after_loading: str = "pass",
    settings: dict[str, object] = DSA,
    **environment: str,
) -> Started:
    """Starts a server; other plugins lie in folders that are looked at first or last.

    MAKE_BACKEND makes draft-extend's backend alone, so that role alone is asked for, unless a flag or
    the environment say otherwise: an empty variable leaves the roles to the plugin.

    Args:
        change: a statement inside the scheduler's constructor.
        after_loading: a statement between loading plugins and making the scheduler.
        settings: what SGLang decided about the server's arguments.
    """
    what = {
        "first": first,
        "last": last,
        "flags": flags,
        "handed": str(folder / "handed"),
        "settings": settings,
        "change": change,
        "after_loading": after_loading,
    }
    environment = {ROLES_VARIABLE: DRAFT_EXTEND, **environment}
    launcher = run(LAUNCHER, json.dumps(what), **environment)
    if launcher.returncode:
        return Started(launcher.returncode, launcher.stderr, None, False)
    scheduler = run(SCHEDULER, json.dumps(what), **environment)
    output = scheduler.stdout.splitlines()
    records = [line.partition(" ")[2] for line in output if line.startswith("record ")]
    return Started(
        scheduler.returncode,
        launcher.stderr + scheduler.stderr + scheduler.stdout,
        json.loads(records[0]) if records else None,
        "ready" in output,
    )
