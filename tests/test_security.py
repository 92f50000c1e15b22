"""The claims of ``SECURITY.md``, one test each."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import INT32_MAX, INT32_MIN, Backend, Case, Guarded, Layout

import sglang_nsa_plugin
from sglang_nsa_plugin.kernels import library

PACKAGE = Path(sglang_nsa_plugin.__file__).parent
INSTALLED = Path(str(distribution("sglang-nsa-plugin").locate_file("")))
LIBRARY = library.LIBRARY.resolve()  # as /proc/self/maps names it
SECURITY = (Path(__file__).resolve().parent.parent / "SECURITY.md").read_text()

FILL = """
import torch, sglang_nsa_plugin
from sglang_nsa_plugin import self_test
for backend in ("cpu", "torch"):
    for ragged in (False, True):
        sglang_nsa_plugin.fill(self_test.small_case(torch.device("cpu"), ragged), backend)
"""
REGISTER = """
from types import SimpleNamespace
from sglang_nsa_plugin import plugin
plugin.register()
plugin.activate(SimpleNamespace(speculative_algorithm="EAGLE", attention_backend="dsa"))
"""


def run(program: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# Files, sockets, processes

WATCHED = """
import json, sys
{before}
def mapped():
    return {{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}
libraries, opened, others = mapped(), set(), set()
watching = True
def watch(event, arguments):
    if not watching:
        return
    if event == "open" and arguments[0] not in sys.path:  # Python looks for a zip archive there
        opened.add(str(arguments[0]))
    elif event.split(".")[0] in ("socket", "subprocess", "ctypes", "shutil", "tempfile", "urllib"):
        others.add(event)
    elif event in ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
                   "os.remove", "os.rename", "os.mkdir", "os.chmod", "os.putenv", "os.unsetenv"):
        others.add(event)
sys.addaudithook(watch)
{program}
watching = False
print(json.dumps([sorted(opened), sorted(others), sorted(mapped() - libraries)]))
"""


def watched(program: str, before: str, folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Files opened, other effects, and libraries loaded by a program, behind the imports ``before``."""
    opened, others, libraries = json.loads(run(WATCHED.format(program=program, before=before), folder))
    return opened, others, libraries


def own(path: str) -> bool:
    """A Python file of the package, or a file of its installed distribution."""
    if Path(path).is_relative_to(PACKAGE):
        return True
    folder = Path(path).relative_to(INSTALLED).parts[0] if Path(path).is_relative_to(INSTALLED) else ""
    return re.fullmatch(r"sglang_nsa_plugin(-.+\.dist-info)?", folder) is not None


def test_a_fill_opens_its_own_files_and_loads_its_own_library(tmp_path: Path) -> None:
    opened, others, libraries = watched(FILL, "import torch, tvm_ffi", tmp_path)
    assert [path for path in opened if not own(path)] == []
    assert others == []
    assert libraries == [str(LIBRARY)]


@pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang, which the plugin registers with")
def test_registering_with_sglang_opens_its_own_files(tmp_path: Path) -> None:
    """Applying the hooks imports modules of SGLang: those are imported before."""
    before = """
import contextlib, torch, tvm_ffi, sglang.srt.server_args
with contextlib.suppress(ImportError):
    from sglang.srt.speculative import eagle_worker_common  # 0.5.16 and later
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.speculative import draft_utils, eagle_draft_extend_cuda_graph_runner
from sglang.srt.plugins.hook_registry import HookRegistry
"""
    opened, others, libraries = watched(REGISTER, before, tmp_path)
    assert [path for path in opened if not own(path)] == []
    assert others == []
    assert libraries == []


def test_the_watch_sees_what_it_looks_for(tmp_path: Path) -> None:
    program = """
import ctypes, socket, subprocess
open("made", "w").close()
socket.socket().close()
subprocess.run(["true"])
"""
    opened, others, _ = watched(program, "import socket, subprocess", tmp_path)
    assert "made" in opened
    assert {"socket.__new__", "subprocess.Popen"} <= set(others)


# The library


def test_no_variable_and_no_working_directory_redirects_the_library(tmp_path: Path) -> None:
    for name in ("nsa_metadata.so", "libnsa_metadata.so", "libtvm_ffi.so", "libcudart.so"):
        (tmp_path / name).write_text("not a library: loading it is an error")
    program = FILL + "print([l.split()[-1] for l in open('/proc/self/maps') if 'nsa_metadata' in l][0])"
    folders = ("LD_LIBRARY_PATH", "TVM_LIBRARY_PATH", "TVM_FFI_LIBRARY_PATH", "TVM_FFI_CACHE_DIR")
    loaded = run(program, tmp_path, **dict.fromkeys(folders, str(tmp_path)))
    assert loaded == str(LIBRARY)


def test_the_library_has_no_run_path() -> None:
    """One left by the build would name a folder that somebody else may make."""
    tags = dynamic_tags(LIBRARY.read_bytes())
    assert NEEDED in tags
    assert tags.isdisjoint({RPATH, RUNPATH})


NEEDED, RPATH, RUNPATH, DYNAMIC = 1, 15, 29, 6


def dynamic_tags(elf: bytes) -> set[int]:
    """The tags of an ELF file's dynamic section."""
    assert elf[:5] == b"\x7fELF\x02", "64 bits"
    header = np.frombuffer(elf, dtype="<u8", count=8)
    sections_at = int(header[5])
    size, count = np.frombuffer(elf, dtype="<u2", count=32)[29:31]
    for number in range(int(count)):
        section = elf[sections_at + number * int(size) :][:64]
        if int.from_bytes(section[4:8], "little") == DYNAMIC:
            offset, length = np.frombuffer(section, dtype="<u8")[3:5]
            return set(np.frombuffer(elf[int(offset) : int(offset + length)], dtype="<u8")[::2].tolist())
    raise AssertionError("no dynamic section")


# The source


def sources(*, commands: bool) -> dict[str, ast.Module]:
    """The modules of the commands, or all others, which a server runs."""
    found = {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
    }
    assert len(found) > 10
    return {
        name: tree for name, tree in found.items() if name.startswith(("cli/", "harness/")) == commands
    }


def variables_of(name: str, tree: ast.Module) -> set[str]:
    """The environment variables that a module reads or sets."""
    names, handed_down = [], 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in READS:
            names.append(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            names.append(node.slice)
        elif isinstance(node, ast.Dict):  # {**os.environ}, for a process that a command starts
            handed_down += [ast.unparse(value) for value in node.values].count("os.environ")
    uses = re.findall(r"\bos\.(?:environ|getenv|putenv)|from os import", ast.unparse(tree))
    assert len(uses) == len(names) + handed_down, f"{name}: a use that this test does not know: {uses}"
    if name == "options.py":  # its functions and actions are handed the names
        names = names_handed_over(tree)
    return {value_of(name, variable) for variable in names}


READS = ("os.environ.get", "os.environ.pop", "os.getenv")


def names_handed_over(tree: ast.Module) -> list[ast.expr]:
    """What the functions that read or set a variable get as its name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    read = [call.args[0] for call in calls if ast.unparse(call.func) == "_from_environment"]
    carried = [word.value for call in calls for word in call.keywords if word.arg == "variable"]
    assert len(read) == len(carried) == 4
    return read + carried


def value_of(name: str, expression: ast.expr) -> str:
    """A text, or the constant that holds it in the module."""
    if isinstance(expression, ast.Name):
        module = name.removesuffix(".py").replace("/", ".")
        return str(getattr(importlib.import_module(f"sglang_nsa_plugin.{module}"), expression.id))
    return str(ast.literal_eval(expression))


@pytest.mark.parametrize("reader", ["server", "commands"])
def test_only_the_documented_variables_are_read(reader: str) -> None:
    documented = re.findall(rf"^\| `([A-Z_]+)` \| {reader} \|", SECURITY, re.MULTILINE)
    used = [variables_of(name, tree) for name, tree in sources(commands=reader == "commands").items()]
    assert set().union(*used) == set(documented)


def test_only_the_documented_settings_of_sglang_are_asked_for() -> None:
    code = "".join(ast.unparse(tree) for tree in sources(commands=False).values())
    asked = set(re.findall(r"\benvs\.(\w+)|'(SGLANG_ENABLE_\w+)'", code))
    asked = {name for pair in asked for name in pair if name}
    assert asked == {"SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "SGLANG_ENABLE_METADATA_GLUE_GRAPH"}
    assert [name for name in asked if f"`{name}`" not in SECURITY] == []


HARMLESS = {"subprocess.CalledProcessError"}  # an exception that Triton may raise
FORBIDDEN = re.compile(
    r"\b(?:eval|exec|compile|open|__import__)\(|\bos\.(?:system|popen|exec\w*|spawn\w*|fork)\b"
    r"|\b(?:subprocess|socket|ctypes|pickle|marshal|shelve|urllib|http|tempfile|shutil)\.\w+"
    r"|from (?:subprocess|socket|ctypes|pickle|marshal|urllib|http|tempfile|shutil)\b"
    r"|\b(?:write_text|write_bytes|unlink|rmdir|mkdir|touch)\("
)


def test_no_source_evaluates_text_or_reaches_outside() -> None:
    used = {
        name: set(FORBIDDEN.findall(ast.unparse(tree))) for name, tree in sources(commands=False).items()
    }
    assert {name: found - HARMLESS for name, found in used.items() if found - HARMLESS} == {}


# What commands do beyond that, as SECURITY.md has it.
OF_COMMANDS = {
    "cli/source_stubs.py": {"compile(", "exec("},
    "cli/environment.py": {
        "shutil.which",
        *(f"subprocess.{name}" for name in ("PIPE", "Popen", "STDOUT", "TimeoutExpired")),
    },
    "cli/bench/timing.py": {
        f"ctypes.{name}" for name in ("CDLL", "byref", "c_int", "c_size_t", "c_void_p")
    },
    # Opens URLs.
    "cli/ab/server.py": {
        "http.client",
        "open(",
        *(f"urllib.{name}" for name in ("error", "parse", "request")),
    },
    "cli/files.py": {"write_text("},
}


def test_commands_do_no_more_than_is_written() -> None:
    used = {
        name: set(FORBIDDEN.findall(ast.unparse(tree))) for name, tree in sources(commands=True).items()
    }
    assert {name: found for name, found in used.items() if found} == OF_COMMANDS
    writes = re.findall(
        r"\.savefig\(|write_text\(", "".join(map(ast.unparse, sources(commands=True).values()))
    )
    assert sorted(set(writes)) == [".savefig(", "write_text("]


# What a request can do

HOSTILE = [0, 1, -1, 39, 40, 41, 2**20, 2**31 - 41, INT32_MIN, INT32_MAX]
HOSTILE_64 = [2**31, 2**32 - 1, 2**32 + 7, -(2**32) - 1, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_no_values_make_a_bound_fill_leave_its_tensors(
    fill_backend: Backend, dtype: torch.dtype
) -> None:
    """A captured fill is checked once and meets other numbers in every replay."""
    names = ("seq_lens", "extend_lens", "req_pool_indices", "req_to_token")
    case = Case(
        seq_lens=[1] * 5,
        extend_lens=[1] * 5,
        rows=9,
        width=40,
        pages=6,
        page_size=8,
        ctx_dims=1,
        row_count=True,
        enabled=1,
        dtypes=dict.fromkeys(names, dtype),
        layouts={"page_table_1": Layout(offset=1, gap=1)},
    )
    guarded = Guarded(case, fill_backend.device)
    bound = fill_backend.bind(guarded.args)
    numbers = torch.tensor(HOSTILE + HOSTILE_64 * (dtype == torch.int64), dtype=dtype)
    random = torch.Generator().manual_seed(0)
    for _ in range(10 if fill_backend.interpreted else 200):
        for name in names:
            tensor = guarded.args.inputs()[name]
            pick = torch.randint(len(numbers), tensor.shape, generator=random)
            tensor.copy_(numbers[pick])
        guarded.args.enabled.fill_(numbers[pick[0, 0]].to(torch.int32))
        guarded.check(lambda _: bound())


@pytest.mark.unsanitized("a time limit")
def test_a_fill_of_hostile_lengths_takes_no_longer(fill_backend: Backend) -> None:
    """Work is bounded by the tensors: 2**31 - 1 tokens and rows a request would take minutes."""
    case = Case(
        seq_lens=[INT32_MAX] * 6, extend_lens=[INT32_MAX] * 6, rows=6, width=40, pages=6, page_size=8
    )
    guarded = Guarded(case, fill_backend.device)
    fill_backend.fill(guarded.args)
    begin = time.monotonic()
    guarded.check(fill_backend.fill)
    assert time.monotonic() - begin < 5
