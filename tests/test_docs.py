"""The pages of docs/: what they show runs, what they quote is there, and no system or public name is left out."""

import ast
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import wsss_losses
import wsss_modules
from recipes.cli import discover

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "api", "auto_gallery"} & set(path.parts)
)
GUIDES = [path for path in PAGES if "```python\n" in path.read_text(encoding="utf-8")]
SYSTEMS = sorted(path for path in (ROOT / "docs" / "systems").glob("*.md") if path.stem != "index")


def api_pages() -> ModuleType:
    spec = spec_from_file_location("api_pages", ROOT / "docs" / "_ext" / "api_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", GUIDES, ids=short)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(code, short(page), "exec"), names)


def test_every_recipe_has_a_page() -> None:
    assert {path.stem for path in SYSTEMS} == set(discover())


@pytest.mark.parametrize("page", SYSTEMS, ids=short)
def test_a_system_page_has_all_sections_about_its_own_recipe(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    asked = re.findall(r"^```\{(\w+)\} (\w+)$", text, re.MULTILINE)
    expected = [(what, page.stem) for what in ("supervision", "commands", "pieces", "verified", "measured")]
    assert asked == expected, f"expected {expected}, got {asked}"
    assert "\n## Equations\n" in text


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_public_names_in_a_page_exist(page: Path) -> None:
    packages = {"wsss_losses": wsss_losses, "wsss_modules": wsss_modules}
    for package, name in re.findall(r"`~?(wsss_losses|wsss_modules)\.(\w+)`", page.read_text(encoding="utf-8")):
        assert name in packages[package].__all__ or (ROOT / package / name).exists(), f"{short(page)}: {package}.{name}"


@pytest.mark.parametrize("package", [wsss_losses, wsss_modules], ids=lambda package: package.__name__)
def test_every_public_name_stands_on_one_page_of_the_api_and_says_what_it_is(package: ModuleType) -> None:
    pages = api_pages()
    listed = [name for names in pages.public_names(package).values() for name in names]
    assert sorted(listed) == sorted(package.__all__)
    for name in listed:
        thing = getattr(package, name)
        assert pages.summary(thing) if callable(thing) else pages.constant_note(package, name), name


@pytest.mark.parametrize("package", ["wsss_losses", "wsss_modules"])
def test_no_description_of_an_argument_begins_like_a_list(package: str) -> None:
    lettered = re.compile(r"^ +[\w, ]+: \w\.( |$)", re.MULTILINE)  # to reStructuredText, "D." is the fourth item
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not lettered.search(path.read_text(encoding="utf-8")), short(path)


@pytest.fixture(scope="module")
def messages() -> str:
    """The fixed words of all strings of the code; what is filled in is `…`."""
    found = []
    for package in ("wsss_losses", "wsss_modules", "recipes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_under_troubleshooting_are_those_of_the_code(messages: str) -> None:
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        for words in filter(None, (part.strip(" ,:;()") for part in re.split("…|, got", message))):
            assert words in messages, f"no string of the code says {words!r} of {message!r}"
