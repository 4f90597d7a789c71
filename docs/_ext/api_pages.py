"""Write ``docs/api``: one page per source file with the public names that come from it, each of them once."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PACKAGES = {"wsss_losses": "Losses", "wsss_modules": "Modules"}
_TABLE = (".. list-table::", "   :widths: 35 65", "   :class: names", "")


def public_names(package: ModuleType) -> dict[str, list[str]]:
    """Source file (its module without the package) to the public names that it gives, in the order of the import."""
    files: dict[str, list[str]] = {}
    for node in ast.parse(inspect.getsource(package)).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package.__name__):
            names = [alias.asname or alias.name for alias in node.names if alias.name in package.__all__]
            files.setdefault(node.module.split(".", 1)[1], []).extend(names)
    return files


def summary(thing: object) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0].split("\n.. ")[0]
    text = " ".join(paragraph.split())
    end = next((i for i in range(len(text)) if text[i : i + 2] in (". ", ": ") or i == len(text) - 1), 0)
    return text[: end + 1].rstrip(":.") + "." if text else ""


def _members(thing: type) -> list[str]:
    """Methods and properties that the class itself defines and explains."""
    fields = getattr(thing, "_fields", ())
    return [
        name
        for name, value in vars(thing).items()
        if not name.startswith("_")
        and name not in fields
        and name != "extra_repr"
        and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
        and inspect.getdoc(getattr(thing, name))
    ]


def constant_note(package: ModuleType, name: str) -> str:
    """What the source says of a constant: the ``#:`` lines above it or the string below it."""
    for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        body = ast.parse(source).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    return " ".join(str(after.value.value).split())
                above = source.splitlines()[: node.lineno - 1]
                notes = itertools.takewhile(lambda line: line.startswith("#:"), reversed(above))
                return " ".join(line.removeprefix("#:").strip() for line in reversed(list(notes)))
    raise ValueError(f"{package.__name__}: no assignment of {name} found")


def _entry(package: ModuleType, name: str) -> str:
    thing = getattr(package, name)
    target = f"{package.__name__}.{name}"
    if inspect.isclass(thing):
        members = _members(thing)
        return f".. autoclass:: {target}\n" + (f"   :members: {', '.join(members)}\n" if members else "")
    if callable(thing):
        return f".. autofunction:: {target}\n"
    return f".. py:data:: {name}\n\n   {constant_note(package, name)}\n"


def _place(package: ModuleType, name: str) -> tuple[str, int]:
    """Where the source has a function or class, so that a page reads as its file does; constants come last."""
    thing = inspect.unwrap(getattr(package, name))
    if not callable(thing):
        return "~", 0
    return inspect.getsourcefile(thing) or "", inspect.getsourcelines(thing)[1]


def _page(package: ModuleType, file: str, names: list[str]) -> str:
    module = importlib.import_module(f"{package.__name__}.{file}")
    title = f"``{file}``"
    head = f"{title}\n{'=' * len(title)}\n\n{inspect.getdoc(module)}\n\n"
    if file not in package.__all__:  # where a function bears the name of its file, the name is the function's
        head += f".. py:module:: {package.__name__}.{file}\n   :no-typesetting:\n\n"
    entries = [_entry(package, name) for name in sorted(names, key=lambda name: _place(package, name))]
    return head + f".. py:currentmodule:: {package.__name__}\n\n" + "\n".join(entries)


def _index(package: ModuleType, files: dict[str, list[str]]) -> str:
    title = f"{PACKAGES[package.__name__]}: ``{package.__name__}``"
    lines = [title, "=" * len(title), "", inspect.getdoc(package) or "", ""]
    lines += [f".. py:currentmodule:: {package.__name__}", "", ".. toctree::", "   :hidden:", ""]
    lines += [f"   {file}" for file in sorted(files)]
    lines += ["", *_TABLE]
    for file in sorted(files):
        says = summary(importlib.import_module(f"{package.__name__}.{file}"))
        lines += [f"   * - :doc:`{file}`", f"     - {says}"]
    lines += ["", "All names", "---------", "", *_TABLE]
    for name in sorted(package.__all__, key=str.lower):
        thing = getattr(package, name)
        role = "class" if inspect.isclass(thing) else "func" if callable(thing) else "data"
        says = summary(thing) if role != "data" else constant_note(package, name)
        lines += [f"   * - :py:{role}:`~{package.__name__}.{name}`", f"     - {says}"]
    return "\n".join(lines) + "\n"


def write_pages(app: Sphinx) -> None:
    """Make the folder anew; a file whose text stays the same keeps its date, so that Sphinx doesn't read it again."""
    wanted: dict[Path, str] = {}
    root = Path(app.srcdir) / "api"
    for package_name in PACKAGES:
        package = importlib.import_module(package_name)
        files = public_names(package)
        missing = set(package.__all__) - {name for names in files.values() for name in names}
        if missing:
            raise ValueError(f"{package_name}: no source file found for {sorted(missing)}")
        wanted[root / package_name / "index.rst"] = _index(package, files)
        wanted.update(
            {root / package_name / f"{file}.rst": _page(package, file, names) for file, names in files.items()}
        )
    if root.exists() and set(root.rglob("*.rst")) - set(wanted):
        shutil.rmtree(root)
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for sources."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
