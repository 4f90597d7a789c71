"""Which stages a recipe has, read from its source: nothing is run, and nothing has to list them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any


def stage_names(module: ModuleType) -> list[str]:
    """The stages of a recipe, read from its source and the functions of recipes that it calls.

    In a name that is put together, ``*`` stands for what is filled in.
    """
    names: dict[str, None] = {}
    sources, seen = [(ast.parse(inspect.getsource(module)), vars(module))], set()
    for tree, known in sources:
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "stage":
                parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else call.args[:1]
                names["".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)] = None
            function = inspect.unwrap(_called(call, known))
            if inspect.isfunction(function) and function.__module__.startswith("recipes.") and function not in seen:
                seen.add(function)
                sources.append((ast.parse(textwrap.dedent(inspect.getsource(function))), function.__globals__))
    return list(names)


def _called(call: ast.Call, known: Mapping[str, Any]) -> Any:
    """What is called by its name, or by that of its module and its own; None for anything else."""
    match call.func:
        case ast.Name(name):
            return known.get(name)
        case ast.Attribute(ast.Name(name), attribute) if inspect.ismodule(known.get(name)):
            return getattr(known[name], attribute, None)
    return None


def check_until(until: str | None, recipe: str, module: ModuleType) -> None:
    """Raise a ``ValueError`` if a recipe has no stage of that name, after which it could be stopped."""
    known = [] if until is None else stage_names(module)
    if until is not None and not any(fnmatchcase(until, name) for name in known):
        raise ValueError(f"until: {recipe} has {', '.join(known) or 'no stages'}, but no {until!r}")
