"""Links of the repository's own Markdown, which are right in a checkout, made right on the site."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

_LINK = re.compile(r"(?<!\!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def rewrite(app: Sphinx, page: str, text: str, base: Path) -> str:
    """Point links at pages of the site where there is one; a file or folder outside it becomes its name."""
    docs = Path(app.srcdir).resolve()
    here = (docs / page).parent

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        file = (base / target).resolve()
        if file.suffix == ".md" and file.is_relative_to(docs) and file.exists():
            return f"[{label}]({os.path.relpath(file, here)}{anchor})"
        if file.suffix == ".md" and (docs / file.name.lower()).exists() and file.parent == docs.parent:
            return f"[{label}]({os.path.relpath(docs / file.name.lower(), here)}{anchor})"
        if file.suffix == ".py" and file.parent.name == "recipes" and (docs / "systems" / f"{file.stem}.md").exists():
            return f"[{label}]({os.path.relpath(docs / 'systems' / f'{file.stem}.md', here)})"
        inside = os.path.relpath(file, docs.parent)  # a file or folder that the site does not have
        return f"`{inside}`" if label.strip("`") in (inside, target) else f"{label} (`{inside}` of the repository)"

    return _LINK.sub(replace, text)


def on_include(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """An included file is linked from where it stands."""
    content[0] = rewrite(app, parent, content[0], Path(app.srcdir, path).resolve().parent)


def on_source(app: Sphinx, page: str, content: list[str]) -> None:
    """Generated pages live in the folder of the site but are read in the repository too."""
    if page in ("results", "benchmarks", "kernels", "profiles"):
        content[0] = rewrite(app, page, content[0], Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to pages as they are read."""
    app.connect("include-read", on_include)
    app.connect("source-read", on_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
