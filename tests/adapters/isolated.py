"""Programs in processes of their own, forked from one that has imported SGLang already.

SGLang loads plugins once a process, and importing it takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What every process that loads plugins imports, and what the adapter hooks.
PRELOADED = (
    "sglang.srt.server_args",
    "sglang.srt.plugins",
    "sglang.srt.layers.attention.dsa_backend",
    "sglang.srt.speculative.draft_utils",
    "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner",
)
TIME_LIMIT_S = 300

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([*PRELOADED])


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program, with SGLang's modules loaded and no plugins, and returns how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _forkserver.Process(
            target=_execute, args=(program, arguments, environment, str(out), str(err))
        )
        process.start()
        process.join(TIME_LIMIT_S)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"the program ran over {TIME_LIMIT_S} s: {program}")
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _execute(
    program: str, arguments: tuple[str, ...], environment: dict[str, str], out: str, err: str
) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        target = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.dup2(target, stream.fileno())
    for name in [name for name in os.environ if name.startswith("SGLANG_")]:
        del os.environ[name]
    os.environ.update(environment)
    sys.argv[:] = ["program", *arguments]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def run_fresh(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter that has imported nothing."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
