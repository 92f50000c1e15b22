"""``docs/architecture.md`` is the map: what it names exists, and no module is missing from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = (ROOT / "docs" / "architecture.md").read_text()
CPP = (".h", ".cc", ".cu", ".cuh")


def places() -> list[tuple[str, str]]:
    """Every ``file:function`` of the map."""
    return re.findall(r"`([\w/]+\.\w+):([\w.]+)`", MAP)


def listed() -> list[str]:
    """The files and folders that the tables of the map have a line for."""
    found = []
    for section in MAP.split("\n### `")[1:]:
        folder, _, text = section.partition("\n## ")[0].partition("`")
        found += [folder + name for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)]
    return found


def has_function(path: Path, name: str) -> bool:
    """Whether the file defines the function, class or ``Class.method``."""
    if path.suffix in CPP:
        return re.search(rf"^[^/\n]*\b{name}\([^;]*\{{", path.read_text(), re.MULTILINE) is not None
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def is_only_a_docstring(path: Path) -> bool:
    return path.name == "__init__.py" and len(ast.parse(path.read_text()).body) <= 1


def test_functions_exist() -> None:
    assert len(places()) > 25
    assert [
        f"{file}:{name}"
        for file, name in places()
        if not (ROOT / file).is_file() or not has_function(ROOT / file, name)
    ] == []


def test_paths_exist() -> None:
    named = set(re.findall(r"`((?:sglang_nsa_plugin|csrc|tests|integration|docs)/[\w/.]*)[`:]", MAP))
    assert len(named) > 40
    assert sorted(path for path in {*named, *listed()} if not (ROOT / path).exists()) == []


def test_files_of_the_main_path_exist() -> None:
    """They are named as the reader sees them, without the package's folder."""
    text = MAP.partition("## Nine files")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w/]+\.\w+)`", text)
    assert len(names) == 9
    assert [
        name
        for name in names
        if not any((ROOT / top / name).is_file() for top in ("", "sglang_nsa_plugin"))
    ] == []


def test_every_file_has_a_line() -> None:
    modules = [*(ROOT / "sglang_nsa_plugin").rglob("*.py"), *(ROOT / "integration").rglob("*.py")]
    sources = [path for path in (ROOT / "csrc").iterdir() if path.is_file()]
    scripts = (ROOT / "integration").rglob("*.sh")
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    wanted = {
        *(str(path.relative_to(ROOT)) for path in (*sources, *scripts)),
        *(str(path.relative_to(ROOT)) for path in modules if not is_only_a_docstring(path)),
        *(f"{path.relative_to(ROOT)}/" for path in folders),
    }
    assert len(wanted) > 100
    assert sorted(wanted - set(listed())) == []


def test_every_file_has_one_line() -> None:
    lines = listed()
    assert sorted({name for name in lines if lines.count(name) > 1}) == []


def test_the_layers_are_those_that_lint_checks() -> None:
    """The line of arrows names every module that the contract of pyproject.toml orders."""
    (arrows,) = re.findall(r"^    (cli → .*)$", MAP, re.MULTILINE)
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("\n]")[0]
    ordered = [re.findall(r"\w+", layer) for layer in re.findall(r'"(.+)"', contract)]
    shown = [re.findall(r"\w+", layer) for layer in arrows.split("→")]
    assert shown == [layer for layer in ordered if layer != ["__main__"]]
