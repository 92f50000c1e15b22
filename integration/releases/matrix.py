"""``make test-releases``: the plugin against SGLang's own code in each release, without a GPU.

    python -m integration.releases.matrix [VERSION ...]
    python -m integration.releases.matrix latest

For each release, by default all that are listed as tested: a fresh environment below .releases/ with
that release and its own transformers, in which SGLang's loader discovers the installed wheel, its own
command line parses the flag, and its own backend class is filled by both and compared value by value,
in each role; where the plugin leaves a role to SGLang, its own words say why.
Writes integration/results/releases.json, or below NSA_RESULTS_DIR.

``latest`` asks the package index for the newest release, tries it in the same way, and prints the names
that are others than the plugin's, and one verdict. Its row is written once it is listed as tested.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration import result_files
from integration.releases.install_sglang import release_key

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".releases"
RESULT = "releases.json"
LATEST = "latest"
STEPS = 100
AT_ONCE = 2  # releases; each takes one core, for most of its time
# How SGLang's draft-extend code came to be what it is, and the first release of each generation.
GENERATIONS = {
    "B": ("0.5.11", "NSA, planned eagerly or replayed ragged"),
    "C": ("0.5.13", "DSA, planned eagerly"),
    "D": ("0.5.15", "DSA, captured in CUDA graphs"),
    "E": ("0.5.20", "D with k-pooling and another runner"),
    "F": ("0.5.22", "E without an early fence"),
}
TIME_LIMIT_S = 2400  # for the tests of one release, on cores that other work shares
ALL_ROLES_SINCE = "C"  # a generation
ROLES = ("draft-extend", "draft-decode", "verify", "decode")
DECODE_SINCE = "0.5.18"  # before it req_to_token is free too early for a fill in a decode graph
# Named first so that nothing later chooses them; what the tests need comes with the wheel's extra.
FIRST = ("torch==2.13.0", "triton==3.6.0", "numpy>=2,<2.4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "version", nargs="*", help=f"such as 0.5.14, or {LATEST}; default: all tested releases"
    )
    parser.add_argument("--keep", action="store_true", help="use the environments of an earlier run")
    parser.add_argument(
        "--values",
        action="store_true",
        help="compare values alone; the tests are those of an earlier run",
    )
    arguments = parser.parse_args()
    if arguments.version == [LATEST]:
        return try_latest(arguments.keep)
    versions = arguments.version or tested_releases()
    wheel = build_wheel()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(
            lambda version: try_release(version, wheel, arguments.keep, arguments.values), versions
        )
        rows = dict(zip(versions, found, strict=True))
    result_files.merge(RESULT, "make test-releases", rows, alone=True)
    print(as_text(rows))
    return 0 if all(row["verdict"] == "equal" for row in rows.values()) else 1


def try_latest(keep: bool) -> int:
    """Tries the newest release; whatever goes wrong, the last line is the verdict."""
    version = latest_release()
    is_tested = version in tested_releases()
    print(f"SGLang {version} is the newest release{', and listed as tested' if is_tested else ''}")
    try:
        row = try_release(version, build_wheel(), keep)
        names = changed_names(str(FOLDER / version / "bin" / "python"))
    except subprocess.SubprocessError as error:
        print(f"verdict: SGLang {version} could not be tried: {error}")
        return 1
    if is_tested:
        result_files.merge(RESULT, f"make test-release VERSION={version}", {version: row}, alone=True)
    print("\n".join([as_text({version: row}), *names_as_text(names), verdict(version, row, names)]))
    return 0 if row["verdict"] == "equal" else 1


def latest_release() -> str:
    """The newest release that the package index has for this Python, pre-releases left out."""
    command = [
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "-qq",
        "--report",
        "-",
        "sglang",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return str(json.loads(done.stdout)["install"][0]["metadata"]["version"])


def changed_names(python: str) -> list[dict[str, Any]]:
    """What `names` finds in this environment."""
    command = [python, "-W", "ignore", "-m", "integration.releases.names"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def names_as_text(names: list[dict[str, Any]]) -> list[str]:
    """Three lines for each target that is another one."""
    lines = []
    for name in names:
        lines += [
            f"{name['target']}: {'does not fit' if name['misfit'] else 'fits, has more'}",
            f"  the plugin uses  {', '.join(name['ours'])}",
            f"  SGLang has       {', '.join(name['theirs']) or name['misfit']}",
        ]
    return lines


def verdict(version: str, row: dict[str, Any], names: list[dict[str, Any]]) -> str:
    """One line: does the plugin fill with this release, and if not, what to look at."""
    unfit = sum(name["misfit"] is not None for name in names)
    if unfit:
        what = f"the plugin steps aside, {unfit} targets do not fit, see above"
    elif row["adapter"] is None:
        what = f"the plugin steps aside: {row['reason']}"
    elif row["values_different"]:
        what = f"{row['values_different']} values are different"
    elif row["verdict"] != "equal":
        what = "every value is equal, but tests failed, see above"
    else:
        listed = "" if version in tested_releases() else "; add it to TESTED in adapters/releases.py"
        what = f"equal, the plugin fills ({row['adapter']}){listed}"
    return f"verdict: SGLang {version}: {what}"


def tested_releases() -> list[str]:
    """The list in adapters/releases.py, read without importing the package: it may not be built here."""
    path = ROOT / "sglang_nsa_plugin" / "adapters" / "releases.py"
    tree = ast.parse(path.read_text())
    (listed,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED"
    )
    return sorted(ast.literal_eval(listed), key=release_key)


def generation(version: str) -> str:
    """The last generation that began with this release or before it."""
    key = release_key(version)
    return max(name for name, (first, _) in GENERATIONS.items() if release_key(first) <= key)


def build_wheel() -> Path:
    """The wheel of this source tree, which every environment installs."""
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_release(version: str, wheel: Path, keep: bool, values_alone: bool = False) -> dict[str, Any]:
    """One row of the table: what was found, hooked and compared in this release."""
    begin = time.monotonic()
    python = environment(version, wheel, keep)
    demo_passed, demo = run_demo(python, FOLDER / f"demo-{version}.json")
    tests_passed, tests = earlier_tests(version) if values_alone else run_tests(python)
    state = demo.get("state", {})
    roles = {role: _of_role(part) for role, part in demo.get("roles", {}).items()}
    passed = demo_passed and tests_passed and demo.get("verdict") == "equal"
    passed = passed and not missing_roles(version, roles)
    row = {
        "generation": generation(version),
        "adapter": state.get("adapter"),
        "implementation": state.get("backend"),
        "reason": state.get("reason"),
        "hook_targets": demo.get("hook_targets", []),
        "steps": demo.get("steps"),
        "values_compared": sum(demo.get("compared", {}).values()),
        "values_different": sum(demo.get("different", {}).values()),
        "roles": roles,
        "adapter_tests": tests,
        "torch": demo.get("torch"),
        "transformers": demo.get("transformers"),
        "verdict": "equal" if passed else "failed",
        "seconds": round(time.monotonic() - begin),
    }
    print(f"{version}: {row['verdict']} after {row['seconds']} s", flush=True)
    return row


def _of_role(part: dict[str, Any]) -> dict[str, Any]:
    if "declined" in part:
        return part
    compared, different = (sum(part[key].values()) for key in ("compared", "different"))
    return {"values_compared": compared, "values_different": different}


def missing_roles(version: str, roles: dict[str, dict[str, Any]]) -> list[str]:
    """The roles that the plugin should fill in this release and does not."""
    of_step = ROLES[:3] if generation(version) >= ALL_ROLES_SINCE else ROLES[:1]
    due = ROLES if release_key(version) >= release_key(DECODE_SINCE) else of_step
    return [role for role in due if not roles.get(role, {}).get("values_compared")]


def environment(version: str, wheel: Path, keep: bool) -> str:
    """A virtual environment with this SGLang and the wheel; returns its Python."""
    folder = FOLDER / version
    python = str(folder / "bin" / "python")
    if not (keep and folder.is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        run(python, "-m", "pip", "install", "-qq", *FIRST)
    run(python, "-m", "integration.releases.install_sglang", version)
    if keep:  # an older wheel of the same version may be there
        run(python, "-m", "pip", "uninstall", "-qq", "-y", "sglang-nsa-plugin")
    run(python, "-m", "pip", "install", "-qq", f"{wheel}[test]")
    return python


def run_demo(python: str, path: Path) -> tuple[bool, dict[str, Any]]:
    """SGLang's loader and its real backend class, hundreds of steps, every value compared."""
    path.unlink(missing_ok=True)
    command = [python, "-m", "sglang_nsa_plugin", "demo", "--steps", str(STEPS), "--json", str(path)]
    done = subprocess.run(
        command, cwd=FOLDER, env=clean_environment(), timeout=TIME_LIMIT_S, check=False
    )
    return done.returncode == 0, json.loads(path.read_text()) if path.is_file() else {}


def run_tests(python: str) -> tuple[bool, dict[str, Any]]:
    """tests/adapters: SGLang's own parser with the flag, what is declined, values, counters."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/adapters"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(),
        timeout=TIME_LIMIT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-3000:] if done.returncode else done.stdout.strip().splitlines()[-1], flush=True)
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)
    return done.returncode == 0, {word: int(count) for count, word in found}


def earlier_tests(version: str) -> tuple[bool, dict[str, Any]]:
    """What the tests of the last run with them found, and its commit. Without one nothing has passed."""
    committed = result_files.committed(RESULT) or {"parts": {}}
    row = committed["parts"].get(version, {})
    tests = {"commit": row.get("of", {}).get("commit"), **row.get("adapter_tests", {})}
    return bool(tests.get("passed")) and not tests.get("failed"), tests


def clean_environment() -> dict[str, str]:
    """Without this shell's settings of SGLang; with bytecode, or each import takes 40 s."""
    dropped = ("SGLANG_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, timeout=TIME_LIMIT_S)


def as_text(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each release."""
    lines = [
        f"{version:14} {row['generation']} {row['adapter'] or '-':9} {len(row['hook_targets']):2} hooks "
        f"{row['values_compared']:>12,} values, {row['values_different']} different, {row['verdict']}: "
        f"{', '.join(f'{role} {said_of(part)}' for role, part in row['roles'].items())}"
        for version, row in rows.items()
    ]
    return "\n".join(lines)


def said_of(part: dict[str, Any]) -> str:
    """How many values of a role were compared and equal, or why the plugin leaves it to SGLang."""
    if "declined" in part:
        return f"declined: {part['declined']}"
    return "different" if part["values_different"] else f"{part['values_compared']:,}"


if __name__ == "__main__":
    raise SystemExit(main())
