"""What the page of a system says that the repository knows: its pieces, how they are verified, what was measured.

``{pieces} NAME``, ``{verified} NAME``, ``{measured} NAME``, ``{commands} NAME`` and ``{supervision} NAME`` read the
README's table, the recipe, the golden files, the records of runs and the remarks of docs/results.md when the site is
built, so that no page repeats a figure by hand.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from api_pages import PACKAGES, constant_note, summary
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "data"
COLUMNS = (
    ("seed", "seed", "seed, train"),
    ("seed", "val", "seed, val"),
    ("mask", "seed", "mask, train"),
    ("mask+crf", "seed", "mask + CRF, train"),
    ("segmentation", "val", "segmentation, val"),
)


def readme_row(name: str) -> list[str]:
    """System, paper, pieces, recipe and what is verified, as the README's table has them."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[3] == f"[{name}](recipes/{name}.py)":
            return cells
    raise ValueError(f"README.md: no row of the table of systems has the recipe {name}")


def piece_names(name: str) -> list[str]:
    """Public names of a system: those of the README's row first, then what the recipe and its own loss file add."""
    found = re.findall(r"`([A-Za-z0-9_]+)`", readme_row(name)[2])
    recipe = ast.parse((ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8"))
    for node in recipe.body:
        if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            found += [alias.name for alias in node.names]
    return list(dict.fromkeys(found))


def _markdown(text: str) -> str:
    """A docstring's sentence in Markdown, fit for the cell of a table."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def _link(name: str) -> tuple[str, str]:
    """A role that leads to the entry of a public name, and what the name is in a line."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        if name in module.__all__:
            thing = getattr(module, name)
            role = "class" if inspect.isclass(thing) else "func" if callable(thing) else "data"
            says = summary(thing) if role != "data" else constant_note(module, name)
            return f"{{py:{role}}}`~{package}.{name}`", _markdown(says)
    raise ValueError(f"{name} is a public name of neither package")


def _gradients(path: Path) -> bool:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return any(key.startswith("grad.") for key in header)


def verified(name: str) -> str:
    """What the golden files kept in the repository cover."""
    files = sorted((ROOT / "tests" / "golden" / "data" / name).glob("*.safetensors"))
    if not files:
        return f"{readme_row(name)[4].capitalize()}."
    cases = Counter(path.stem.split("__")[0] for path in files)
    with_gradients = {path.stem.split("__")[0] for path in files if _gradients(path)}
    listed = ", ".join(f"`{piece}`" + (" and its gradients" if piece in with_gradients else "") for piece in cases)
    return (
        f"{readme_row(name)[4].capitalize()}. Kept in the repository (`tests/golden/data/{name}`) and compared with "
        f"the public API by `python -m pytest tests/golden` are numbers of the released code for {listed}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _measured(record: dict[str, Any], what: str, split: str) -> str:
    found = {
        m["threshold_from"].startswith("oracle"): m
        for m in record["measurements"]
        if (m["what"], m["split"]) == (what, split)
    }
    if False not in found:
        return "-"
    oracle = f" ({_number(found[True]['miou'])} at {found[True]['threshold']:g})" if True in found else ""
    return _number(found[False]["miou"]) + oracle


def records(name: str, folder: str) -> dict[str, dict[str, Any]]:
    """The runs of a recipe that are kept in ``docs/data/FOLDER``, by name."""
    files = sorted((RECORDS / folder).glob("*.json"))
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    return {stem: run for stem, run in runs.items() if run["recipe"] == name}


def measured(name: str) -> str:
    """Tables of what was measured on photographs and on the demo data, under which conditions, and what they say."""
    on_photographs = _table(
        records(name, "runs"),
        "real PASCAL VOC 2012 photographs",
        {"seed": "training photographs with hand-made masks", "val": "photographs of the val list"},
    )
    on_drawings = _table(
        records(name, "demo"),
        "the built-in demo data, drawn scenes of 128 pixels, preset `demo`",
        {"seed": "training scenes", "val": "scenes of the val list"},
    )
    found = "\n\n".join(
        part
        for part in (
            on_photographs or "Not run on photographs yet.",
            remarks(name, "On photographs") if on_photographs else "",
            on_drawings,
            remarks(name, "On the demo data") if on_drawings else "",
        )
        if part
    )
    return found + (
        "\n\nFixed thresholds; in brackets the best one, found with the ground truth of the same list, which is no "
        "result. A dash was not run. [Conditions, other systems, and the IoU of each class](/results.md)."
        if on_photographs or on_drawings
        else ""
    )


def remarks(name: str, section: str) -> str:
    """What docs/results.md says of a system in a section: the paragraphs and items that name it."""
    if name == "cam":  # every other one is held against it
        return ""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = page.split(f"\n## {section}\n")[1].split("\n### Remarks\n")[1].split("\n### ")[0]
    blocks = re.split(r"\n(?=- |\n)", text)
    return "\n\n".join(
        " ".join(block.removeprefix("- ").split()) for block in map(str.strip, blocks) if f"`{name}`" in block
    )


def _table(runs: dict[str, dict[str, Any]], data: str, lists: dict[str, str]) -> str:
    """One table, what its figures are of, and the commands that made them; nothing without runs."""
    if not runs:
        return ""
    images = {m["split"]: m["images"] for record in runs.values() for m in record["measurements"]}
    classes = next(len(m["iou"]) for record in runs.values() for m in record["measurements"])
    where = " and ".join(f"{images[split]} {what}" for split, what in lists.items() if split in images)
    return "\n".join(
        [
            f"On {data}: {where}. mIoU in percent over {classes} classes, background included.",
            "",
            "| run | " + " | ".join(title for *_, title in COLUMNS) + " |",
            "| --- |" + " --: |" * len(COLUMNS),
            *(
                f"| `{run}` | " + " | ".join(_measured(record, what, split) for what, split, _ in COLUMNS) + " |"
                for run, record in runs.items()
            ),
            "",
            "```bash",
            *(record["command"] for record in runs.values()),
            "```",
        ]
    )


def pieces(name: str) -> str:
    """A table of the public names, each linked to its entry."""
    rows = [f"| {link} | {says} |" for link, says in map(_link, piece_names(name))]
    return "\n".join(["| piece | what it is |", "| --- | --- |", *rows])


def commands(name: str) -> str:
    """The commands at the top of the recipe."""
    text = ast.get_docstring(ast.parse((ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8"))) or ""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python -m recipes")]
    return "\n".join(["```bash", *lines, "```"])


def system_table() -> str:
    """All systems, their papers and what they are supervised by."""
    lines = ["| system | paper | supervision |", "| --- | --- | --- |"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Figures")[0]
    for name in re.findall(r"\(recipes/(\w+)\.py\)", readme):
        system, paper, *_ = readme_row(name)
        title = re.sub(r" \((tags and|boxes|EPS:).*\)", "", system)
        lines.append(f"| [{title}]({name}.md) | {paper} | {_kind(system)} |")
    return "\n".join(lines)


def _kind(system: str) -> str:
    inside = re.search(r"\(((?:\w+: )?(?:tags and [^()]*|boxes))\)", system)
    if inside is None:
        return "image tags"
    return f"image tags; {inside[1]}" if ":" in inside[1] else inside[1]


def supervision(name: str) -> str:
    """Paper and supervision, from the README's first columns."""
    system, paper, *_ = readme_row(name)
    return f"{paper} · supervision: **{_kind(system)}** · recipe: `recipes/{name}.py`"


class _Facts(SphinxDirective):
    optional_arguments = 1
    write = staticmethod(str)

    def run(self) -> list[nodes.Node]:
        """Write Markdown and read it where the directive stands."""
        self.env.note_reread()  # the README, recipes, docstrings, golden numbers and records: all but the page itself
        return self.parse_text_to_nodes(self.write(*self.arguments[:1]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    for function in (pieces, verified, measured, commands, supervision, system_table):
        app.add_directive(
            function.__name__.replace("_", "-"), type(function.__name__, (_Facts,), {"write": staticmethod(function)})
        )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
