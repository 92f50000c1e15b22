"""Imports a package as stubs: its classes, fields, parameters, and the attributes that methods set.

Importing SGLang's attention backend takes seconds, prints warnings, and starts a CUDA context on a GPU
host. Whether an adapter fits is a question about names and parameters: the source is enough for that.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@contextlib.contextmanager
def stubbed(package: str) -> Iterator[None]:
    """Inside the block, ``package`` and its modules are imported as stubs; none of their code runs.

    Modules that were imported before are put back at the end.
    """
    real = _remove(package)
    finder = _Finder(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _remove(package)
        sys.modules.update(real)


def why_import_fails(package: str) -> str | None:
    """The first name that a stub of the package imports from there and that is missing, or None.

    To be called inside :func:`stubbed`. Only imports are looked at that run whenever the module does.
    """
    stubs = [module for name, module in sys.modules.items() if _belongs(name, package)]
    for module in stubs:
        loader = getattr(module.__spec__, "loader", None)
        if isinstance(loader, _Loader):
            for node in loader.imports(loader.parse()):
                for alias in node.names:
                    if not _provides(str(node.module), alias.name):
                        place = f"{loader.path}, line {node.lineno}"
                        return f"{place}: cannot import name {alias.name!r} from {node.module!r}"
    return None


def _provides(module: str, name: str) -> bool:
    """Whether a module of the package binds the name, or has a submodule of that name."""
    imported = import_module(module)
    loader = getattr(imported.__spec__, "loader", None)
    if name == "*" or not isinstance(loader, _Loader) or name in loader.bound():
        return True
    return hasattr(imported, "__path__") and find_spec(f"{module}.{name}") is not None


def _remove(package: str) -> dict[str, ModuleType]:
    """Removes the package's modules from ``sys.modules`` and returns them."""
    names = [name for name in sys.modules if _belongs(name, package)]
    return {name: sys.modules.pop(name) for name in names}


def _belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _belongs(fullname, self._package):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        loader = _Loader(fullname, spec.loader.path, self._package)
        return spec_from_file_location(
            fullname,
            spec.loader.path,
            loader=loader,
            submodule_search_locations=spec.submodule_search_locations,
        )


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, package: str) -> None:
        super().__init__(fullname, path)
        self._package = package

    def parse(self) -> ast.Module:
        """The module's source."""
        return ast.parse(self.get_data(self.path), self.path)

    def imports(self, source: ast.Module) -> list[ast.ImportFrom]:
        """The statements that import names from the package whenever the module is imported."""
        return [
            node
            for node in source.body
            if isinstance(node, ast.ImportFrom) and _belongs(node.module or "", self._package)
        ]

    def bound(self) -> _Bound:
        """The names that the module may bind."""
        bound = _Bound()
        bound.visit(self.parse())
        return bound

    def exec_module(self, module: ModuleType) -> None:
        source = self.parse()
        imports = self.imports(source)
        module.__dict__["__getattr__"] = _ImportedNames(module.__name__, imports)
        statements = [*ast.parse("import dataclasses").body, *_statements(source.body, imports)]
        stubs = ast.fix_missing_locations(ast.Module(statements, type_ignores=[]))
        exec(compile(stubs, self.path, "exec"), module.__dict__)


class _Bound(ast.NodeVisitor):
    """Names that a module binds anywhere outside functions and classes."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._any = False  # by an import of *, or by a __getattr__ of the module

    def __contains__(self, name: str) -> bool:
        return self._any or name in self._names or (name.startswith("__") and name.endswith("__"))

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._names.add(node.name)
        self._any |= node.name == "__getattr__"

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _define  # noqa: N815

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._names.add(node.id)

    def visit_alias(self, node: ast.alias) -> None:
        self._any |= node.name == "*"
        self._names.add(node.asname or node.name.partition(".")[0])

    def visit_Global(self, node: ast.Global) -> None:
        self._names.update(node.names)


class _ImportedNames:
    """A module's ``__getattr__``: what it imports from the package is imported at first use."""

    def __init__(self, module: str, imports: list[ast.ImportFrom]) -> None:
        self._module = module
        self._origins = {
            alias.asname or alias.name: (str(node.module), alias.name)
            for node in imports
            for alias in node.names
        }

    def __call__(self, name: str) -> object:
        if name not in self._origins:
            raise AttributeError(f"module {self._module!r} has no attribute {name!r}")
        origin, there = self._origins[name]
        return getattr(import_module(origin), there)


def _statements(body: list[ast.stmt], imports: list[ast.ImportFrom]) -> Iterator[ast.stmt]:
    """The module's functions and classes, and imports of the base classes."""
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    bases = {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}
    known = {node.name for node in classes}
    for node in imports:
        names = [alias for alias in node.names if (alias.asname or alias.name) in bases]
        known.update(alias.asname or alias.name for alias in names)
        if names:
            yield ast.ImportFrom(node.module, names, 0)
    for statement in body:
        if isinstance(statement, FUNCTIONS):
            yield _function(statement)
        elif isinstance(statement, ast.ClassDef):
            yield _class(statement, known)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    arguments = node.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    node.returns = None
    node.decorator_list = [
        decorator
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Name)
        and decorator.id in ("staticmethod", "classmethod", "property")
    ]
    stored = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
    names = sorted({each.attr for each in stored if isinstance(each.ctx, ast.Store)})
    node.body = [ast.Pass(), *ast.parse("".join(f"_.{name} = None\n" for name in names)).body]
    return node


def _class(node: ast.ClassDef, known: set[str]) -> ast.stmt:
    """Every dataclass field gets a default, so that any order of fields is valid."""
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    node.decorator_list = [ast.parse("dataclasses.dataclass", mode="eval").body] if is_dataclass else []
    node.bases = [base for base in node.bases if isinstance(base, ast.Name) and base.id in known]
    node.keywords = []
    body: list[ast.stmt] = [ast.Pass()]
    for member in node.body:
        if isinstance(member, FUNCTIONS):
            body.append(_function(member))
        elif isinstance(member, ast.AnnAssign) and "ClassVar" not in ast.unparse(member.annotation):
            member.annotation, member.value = ast.Constant(None), ast.Constant(None)
            body.append(member)
    node.body = body
    return node
