"""Runs a command on a pseudo-terminal, and shows what is left on the screen when it has ended."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
import tempfile
import termios

LINES = 50
NO_WRAP = 1_000  # columns: more than any line has


def run(command: list[str], columns: int, **environment: str) -> tuple[int, str]:
    """The exit code of a command on a terminal of this width, and its output with control sequences."""
    terminal, program_side = os.openpty()
    fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=program_side,
            stdout=program_side,
            stderr=errors,
            env={**inherited, "TERM": "xterm-256color", "PYTHONSAFEPATH": "1", **environment},
        )
        os.close(program_side)
        chunks = []
        while chunk := _read(terminal):
            chunks.append(chunk)
        os.close(terminal)
        code = process.wait()
        if code != 0:
            errors.seek(0)
            print(errors.read().decode(errors="replace"), file=sys.stderr)
    return code, b"".join(chunks).decode(errors="replace")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError as error:
        if error.errno != errno.EIO:  # Linux: the last program has closed the terminal
            raise
        return b""


def final_screen(output: str) -> list[str]:
    """The lines that this output leaves on the screen, in full length: they are not wrapped."""
    import pyte  # here: a GPU host collects this folder's tests without it

    screen = pyte.Screen(NO_WRAP, LINES)
    pyte.Stream(screen).feed(output)
    return [line.rstrip() for line in screen.display if line.strip()]
