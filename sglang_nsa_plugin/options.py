"""The server flags and environment variables, and what they add up to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeVar

from sglang_nsa_plugin.state import ALL_ROLES, DECODE, DRAFT_EXTEND, ROLES

_Value = TypeVar("_Value")

CHOICES = ("auto", "cuda", "triton", "torch", "off")
DEFAULT = "auto"
FLAG, ALIAS = "--nsa-metadata-backend", "--dsa-metadata-backend"
VARIABLE = "SGLANG_NSA_METADATA_BACKEND"
CHECK_FLAG = "--nsa-metadata-check"
CHECK_VARIABLE = "SGLANG_NSA_METADATA_CHECK"
ROLES_FLAG = "--nsa-metadata-roles"
ROLES_VARIABLE = "SGLANG_NSA_METADATA_ROLES"
WIDE_FLAG = "--nsa-metadata-wide-tables"
WIDE_VARIABLE = "SGLANG_NSA_METADATA_WIDE_TABLES"
KEEP = "keep"
WIDE_CHOICES = (DEFAULT, KEEP)
DEFAULT_ROLES = ROLES  # each where it fits; decode alone is filled only where it is named
# From the command line SGLang copies only its own fields. Attributes with an underscore travel to every
# process with the ServerArgs object, and SGLang's resolution of arguments leaves them alone.
ATTRIBUTE = "_nsa_metadata_backend"
CHECK_ATTRIBUTE = "_nsa_metadata_check"
ROLES_ATTRIBUTE = "_nsa_metadata_roles"
WIDE_ATTRIBUTE = "_nsa_metadata_wide_tables"
# In YAML, `off` and `no` without quotes are booleans, which SGLang's --config hands over as `false`.
OFF_WORDS = ("off", "false", "no", "0")
ON_WORDS = ("on", "true", "yes", "1")

HELP = (
    "Who fills the speculative metadata of NSA/DSA sparse attention (sglang-nsa-plugin): auto takes "
    "the compiled CUDA kernel and steps aside where it cannot run; cuda, triton and torch insist on "
    f"one; off leaves the fill to SGLang. Environment: {VARIABLE}. Default: {DEFAULT}."
)
CHECK_HELP = (
    "Compare every Nth fill of each role with SGLang's own, on the device and without waiting "
    f"(sglang-nsa-plugin); 0 never does. Environment: {CHECK_VARIABLE}. Default: 0."
)
ROLES_HELP = (
    f"The plans of a speculative step to fill, with commas between them: {', '.join(ROLES)}; or "
    f"{DECODE}, of a server without speculation, tried on a GPU only with SGLang 0.5.23 "
    f"(sglang-nsa-plugin). Environment: {ROLES_VARIABLE}. Default: all of a speculative step that fit."
)
WIDE_HELP = (
    "The wide page tables of the filled roles (sglang-nsa-plugin): auto leaves them out where "
    f"nothing reads them, keep has SGLang allocate and fill them. Environment: {WIDE_VARIABLE}. "
    f"Default: {DEFAULT}."
)


def validate_environment() -> None:
    """Validates the variables.

    Raises:
        SystemExit: one has an invalid value. SGLang only logs a plugin's ordinary errors, and a mistyped
            setting must end the start.
    """
    _backend_from_environment()
    _check_from_environment()
    _roles_from_environment()
    _wide_tables_from_environment()


def _backend_from_environment() -> str | None:
    """The variable's value, or None where it is unset or empty."""
    return _from_environment(VARIABLE, _one_backend)


def _check_from_environment() -> int | None:
    return _from_environment(CHECK_VARIABLE, _whole_number)


def _roles_from_environment() -> tuple[str, ...] | None:
    return _from_environment(ROLES_VARIABLE, _roles)


def _wide_tables_from_environment() -> str | None:
    return _from_environment(WIDE_VARIABLE, _auto_or_keep)


def _from_environment(variable: str, read: Callable[[str], _Value]) -> _Value | None:
    value = os.environ.get(variable, "").strip()
    try:
        return read(value) if value else None
    except argparse.ArgumentTypeError as error:
        raise SystemExit(f"sglang-nsa-plugin: {variable}: {error}") from error


def backend_of(server_args: object) -> str:
    """The backend that was asked for: by the flag, else by the environment, else the default."""
    return getattr(server_args, ATTRIBUTE, None) or _backend_from_environment() or DEFAULT


def check_of(server_args: object) -> int:
    """Fills from one shadow check to the next, 0 for never: by the flag, else by the environment."""
    flag = getattr(server_args, CHECK_ATTRIBUTE, None)
    return flag if flag is not None else _check_from_environment() or 0


def roles_of(server_args: object) -> tuple[str, ...]:
    """The roles to fill: by the flag, else by the environment, else the default."""
    return _roles_listed(server_args) or DEFAULT_ROLES


def wide_tables_of(server_args: object) -> str:
    """One of WIDE_CHOICES: by the flag, else by the environment, else the default."""
    flag = getattr(server_args, WIDE_ATTRIBUTE, None)
    return flag or _wide_tables_from_environment() or DEFAULT


def names_role(server_args: object, role: str) -> bool:
    """Whether this role was asked for by name. Draft-extend always counts as asked for."""
    return role in (_roles_listed(server_args) or (DRAFT_EXTEND,))


def how_to_name(role: str) -> str:
    """What starts a server that fills this role although it is not filled by default."""
    return f"start with {ROLES_FLAG} {DECODE if role == DECODE else ','.join(ROLES)}"


def _roles_listed(server_args: object) -> tuple[str, ...] | None:
    return getattr(server_args, ROLES_ATTRIBUTE, None) or _roles_from_environment()


class _Carried(argparse._StoreAction):  # SGLang's --config takes no flag of another action
    """Keeps a flag's value where ``ServerArgs.from_cli_args`` is not the plugin's to hook.

    Until :func:`keep_flags` takes it over, the value is in the flag's environment variable, too, which
    every scheduler process inherits.
    """

    def __init__(self, *args: Any, variable: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._variable = variable

    def __call__(
        self, parser: object, namespace: object, value: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, value)
        _carried.setdefault(self._variable, os.environ.get(self._variable))
        os.environ[self._variable] = ",".join(value) if isinstance(value, tuple) else str(value)


class _CarriedRoles(_Carried):
    """The same for a list, which YAML's lists come as."""

    def __call__(
        self, parser: object, namespace: object, value: Any, option_string: str | None = None
    ) -> None:
        asked = tuple(role for role in ALL_ROLES if any(role in roles for roles in value))
        super().__call__(parser, namespace, asked, option_string)


_carried: dict[str, str | None] = {}  # variables that hold a flag's value, and what they held before


def _restore_variables() -> None:
    for variable, before in _carried.items():
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
    _carried.clear()


def add_flags(original: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    """Around ``ServerArgs.add_cli_args``: adds the flags."""
    result = original(parser)
    parser.add_argument(
        FLAG,
        ALIAS,
        action=_Carried,
        variable=VARIABLE,
        type=_one_backend,
        choices=CHOICES,
        default=None,
        help=HELP,
    )
    parser.add_argument(
        CHECK_FLAG,
        action=_Carried,
        variable=CHECK_VARIABLE,
        type=_whole_number,
        metavar="N",
        default=None,
        help=CHECK_HELP,
    )
    parser.add_argument(
        ROLES_FLAG,
        action=_CarriedRoles,
        variable=ROLES_VARIABLE,
        type=_roles,
        nargs="+",
        metavar="ROLE",
        default=None,
        help=ROLES_HELP,
    )
    parser.add_argument(
        WIDE_FLAG,
        action=_Carried,
        variable=WIDE_VARIABLE,
        type=_auto_or_keep,
        choices=WIDE_CHOICES,
        default=None,
        help=WIDE_HELP,
    )
    return result


def keep_flags(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: keeps the flags' values with SGLang's arguments."""
    server_args = original(cls, args)
    setattr(server_args, ATTRIBUTE, getattr(args, "nsa_metadata_backend", None))
    setattr(server_args, CHECK_ATTRIBUTE, getattr(args, "nsa_metadata_check", None))
    setattr(server_args, ROLES_ATTRIBUTE, getattr(args, "nsa_metadata_roles", None))
    setattr(server_args, WIDE_ATTRIBUTE, getattr(args, "nsa_metadata_wide_tables", None))
    _restore_variables()
    return server_args


def _one_backend(text: str) -> str:
    if text.lower() in OFF_WORDS:
        return "off"
    if text not in CHOICES:
        advice = f"; for the plugin's own choice, set {DEFAULT}" if text.lower() in ON_WORDS else ""
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(CHOICES)}, got {text!r}{advice}")
    return text


def _auto_or_keep(text: str) -> str:
    if text not in WIDE_CHOICES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(WIDE_CHOICES)}, got {text!r}")
    return text


def _roles(text: str) -> tuple[str, ...]:
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in ALL_ROLES]
    if unknown or not asked:
        got = ", ".join(unknown) or repr(text)
        raise argparse.ArgumentTypeError(f"must be of {', '.join(ALL_ROLES)}, got {got}")
    return tuple(role for role in ALL_ROLES if role in asked)


def _whole_number(text: str) -> int:
    if text.lower() in OFF_WORDS:
        return 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)
