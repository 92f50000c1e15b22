"""Record what the commands show on a terminal, as text, for docs/terminal/.

    python docs/record.py                  # every command at 80 and at 120 columns
    python docs/record.py verify --columns 100 --into /tmp

Run it with the Python that has sglang-nsa-plugin and SGLang. A command runs on a terminal of its own;
what stands on the screen in the end is written to MACHINE/NAME-COLUMNS.txt, colours left out, where
MACHINE is gpu or cpu. Standard error, where SGLang logs, is left out, and shown here if a command fails.
MACHINE/origin.json names the machine, the versions, the date and the commit of each NAME.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "integration"))
from results import environment  # noqa: E402

PROGRAM = "sglang-nsa-plugin"
RECORDINGS = {"verify": "verify", "demo": "demo", "bench": "bench --quick"}
FOLDER = ROOT / "docs" / "terminal"
COLUMNS = (80, 120)
LINES = 50


def main() -> int:
    """Records what was asked for; returns 1 when a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECORDINGS)}; else all")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS)
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="FOLDER")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RECORDINGS]
    if unknown:
        parser.error(f"NAME: must be one of {', '.join(RECORDINGS)}, got {', '.join(unknown)}")
    folder = arguments.into / machine()
    folder.mkdir(parents=True, exist_ok=True)
    names = arguments.names or list(RECORDINGS)
    origin = environment()  # before a recording makes the working tree differ from its commit
    codes = [record(name, columns, folder) for name in names for columns in arguments.columns]
    keep_origin(dict.fromkeys(names, origin), folder / "origin.json")
    return 1 if any(codes) else 0


def machine() -> str:
    """The folder of this machine's recordings."""
    return "cpu" if shutil.which("nvidia-smi") is None else "gpu"


def record(name: str, columns: int, folder: Path) -> int:
    """Writes one recording; the command's exit code."""
    program = [sys.executable, "-m", "sglang_nsa_plugin"]
    code, raw = on_terminal(program, RECORDINGS[name], columns)
    text = f"$ {PROGRAM} {RECORDINGS[name]}\n{on_screen(raw)}\n"
    path = folder / f"{name}-{columns}.txt"
    path.write_text(text)
    print(f"{path}: {len(text.splitlines())} lines, exit code {code}", flush=True)
    return code


def keep_origin(origins: dict[str, Any], path: Path) -> None:
    """Writes where these recordings come from, beside what is known of the others in the folder."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **origins}, indent=2) + "\n")


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


if __name__ == "__main__":
    raise SystemExit(main())
