"""Command-line flags from the fields of a dataclass, with the help text of its docstring."""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def add_fields(parser: argparse._ActionsContainer, cls: type, names: Sequence[str]) -> None:
    """Add a flag for each named field; a flag that is not given leaves nothing in the namespace."""
    hints, docs = get_type_hints(cls), descriptions(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for name in names:
        kind: Any = hints[name]
        options: dict[str, Any] = {}
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (k for k in get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = kind
        text = docs.get(name, "")
        if defaults[name] not in (None, dataclasses.MISSING):
            text += f" (default: {defaults[name]})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options
        )


def given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the fields of ``cls`` that were given as flags."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(cls) if hasattr(options, f.name)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def descriptions(cls: type) -> dict[str, str]:
    """Return what the docstring's section ``Attributes`` says of each field."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:")[2].partition("Raises:")[0]  # indented alike by every Python
    found: dict[str, str] = {}
    for entry in re.split(r"\n {2}(?=\w)", section):
        head, _, text = entry.partition(":")
        for name in head.split(","):
            found[name.strip()] = re.sub(r"``|`", "", " ".join(text.split())).rstrip(".")
    return found
