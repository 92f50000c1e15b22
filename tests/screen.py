"""Runs a command on a terminal of a given width, and reads what is on its screen in the end."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios

LINES = 50


def on_terminal(program: list[str], arguments: str, columns: int, **variables: str) -> tuple[int, str]:
    """Exit code and output, control sequences and all, of a command on a terminal of that width."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*program, *shlex.split(arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=errors,
            # The installed package runs, not a source tree in this folder.
            env={**inherited, "TERM": "xterm-256color", "PYTHONSAFEPATH": "1", **variables},
        )
        os.close(theirs)
        chunks = []
        while chunk := _read(ours):
            chunks.append(chunk)
        os.close(ours)
        code = process.wait()
        if code != 0:
            errors.seek(0)
            print(errors.read().decode(errors="replace"), file=sys.stderr)
    return code, b"".join(chunks).decode(errors="replace")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError as error:
        if error.errno != errno.EIO:  # Linux says this once the last program has left the terminal
            raise
        return b""


def on_screen(raw: str) -> str:
    """What stands on the screen in the end: lines that were erased or written over are gone.

    Knows what rich writes: colours, carriage return, cursor up, erase line, hide and show the cursor.
    """
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", raw):
        if part == "\n":
            row, column = row + 1, 0
            lines.extend([""] * (row + 1 - len(lines)))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            count, action = part[2:-1], part[-1]
            if action == "A":
                row = max(row - int(count or 1), 0)
            elif action == "K":
                lines[row] = "" if count == "2" else lines[row][:column]
            elif action not in "mhl":
                raise ValueError(f"control sequence {part!r}: not one of those that rich writes")
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in lines).strip("\n")
