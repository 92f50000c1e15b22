"""Record what the commands show on a terminal, as text, for docs/.

    python docs/record.py                  # every command at 80 and at 120 columns
    python docs/record.py verify --columns 100 --into /tmp

Run it with the Python that has sglang-nsa-plugin and SGLang. A command runs on a terminal of its own;
what stands on the screen in the end is written to docs/NAME-COLUMNS.txt, colours left out. A command
that needs a GPU is left out where there is none.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAM = "sglang-nsa-plugin"
LINES = 50


class Recording(NamedTuple):
    """A command line after the program's name, and whether it needs a GPU."""

    command: str
    needs_gpu: bool = False


RECORDINGS = {
    "verify": Recording("verify"),
    "demo": Recording("demo --steps 100"),
    "bench": Recording("bench --quick", needs_gpu=True),
}


def main() -> int:
    """Records what was asked for; returns 1 when a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECORDINGS)}; else all")
    parser.add_argument("--columns", type=int, nargs="+", default=[80, 120])
    parser.add_argument("--into", type=Path, default=HERE, metavar="FOLDER")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RECORDINGS]
    if unknown:
        parser.error(f"NAME: must be one of {', '.join(RECORDINGS)}, got {', '.join(unknown)}")
    failed = [
        name
        for name in arguments.names or RECORDINGS
        if not record(name, arguments.columns, arguments.into)
    ]
    return 1 if failed else 0


def record(name: str, columns: list[int], folder: Path) -> bool:
    """Writes one command's recordings; whether it succeeded at every width."""
    recording = RECORDINGS[name]
    if recording.needs_gpu and shutil.which("nvidia-smi") is None:
        print(f"{name}: left out, it needs an NVIDIA GPU")
        return True
    codes = []
    for width in columns:
        code, raw = on_terminal([sys.executable, "-m", "sglang_nsa_plugin"], recording.command, width)
        text = f"$ {PROGRAM} {recording.command}\n{on_screen(raw)}\n"
        path = folder / f"{name}-{width}.txt"
        path.write_text(text)
        print(f"{path.name}: {len(text.splitlines())} lines, exit code {code}")
        codes.append(code)
    return not any(codes)


def on_terminal(program: list[str], arguments: str, columns: int) -> tuple[int, str]:
    """Exit code and output, control sequences and all, of a command on a terminal of that width."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [*program, *shlex.split(arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        # The installed package runs, not a source tree in this folder.
        env={**environment, "TERM": "xterm-256color", "PYTHONSAFEPATH": "1"},
    )
    os.close(theirs)
    chunks = []
    while chunk := _read(ours):
        chunks.append(chunk)
    os.close(ours)
    return process.wait(), b"".join(chunks).decode(errors="replace")


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


if __name__ == "__main__":
    raise SystemExit(main())
