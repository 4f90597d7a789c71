"""The rules of the house that a reader would otherwise have to trust: who imports whom, and what every name says."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wsss_losses
import wsss_modules

ROOT = Path(__file__).parents[1]
PACKAGES = {"wsss_modules": wsss_modules, "wsss_losses": wsss_losses}
MAY_IMPORT = {
    "wsss_modules": {"torch", "einops", "numpy", "wsss_modules"},
    "wsss_losses": {"torch", "einops", "numpy", "wsss_modules", "wsss_losses"},
}
PUBLIC = [(package, name) for package, module in PACKAGES.items() for name in module.__all__]
LIBRARY = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also those inside functions; relative ones resolved."""
    parents = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_imports_run_downhill_and_need_only_torch_einops_and_numpy(path: Path) -> None:
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]] | set(sys.stdlib_module_names)
    if "kernels" in path.parts:
        allowed |= {"triton"}
    wrong = [f"line {line}: {module}" for line, module in imports(path) if module.split(".")[0] not in allowed]
    assert not wrong, f"{short(path)} may not import {wrong}"


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_recipes_import_only_what_the_packages_export(path: Path) -> None:
    for line, module in imports(path):
        head, *rest = module.split(".")
        assert head != "tests", f"{short(path)}:{line} imports the tests"
        assert head not in PACKAGES or not rest, (
            f"{short(path)}:{line}: import public names from {head}, not from {module}"
        )


BELOW = {"settings": ("settings", "pipeline"), "pipeline": ("pipeline",)}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name in BELOW], ids=short)
def test_recipes_stand_on_their_settings_and_these_on_the_pipeline(path: Path) -> None:
    allowed = BELOW[path.parent.name]
    for line, module in imports(path):
        assert not module.startswith("recipes") or module.startswith(tuple(f"recipes.{part}" for part in allowed)), (
            f"{short(path)}:{line} may import from {' and '.join(allowed)} only, not {module}"
        )


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_the_library_touches_no_device_file_or_terminal(path: Path) -> None:
    forbidden = {"cuda": ".cuda()", "open": "open()", "print": "print()", "save": ".save()", "load": ".load()"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "tl"
        ):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            assert name not in forbidden, f"{short(path)}:{node.lineno} calls {forbidden[name]}"


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.name != "__init__.py"], ids=short)
def test_every_module_has_content_and_no_stub(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), f"{short(path)} does not say what it is"
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    classes = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    assert functions or classes, f"{short(path)} is empty"
    for function in functions:
        body = [
            node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        stub = not body or isinstance(body[0], ast.Pass)
        unwritten = body and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.dump(body[0])
        assert not stub, f"{short(path)}:{function.lineno} {function.name} has no body"
        assert not unwritten, f"{short(path)}:{function.lineno} {function.name} is not written"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_names_once_and_has_them_all(package: str) -> None:
    names = PACKAGES[package].__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(PACKAGES[package], name) for name in names)


@pytest.mark.parametrize("path", [path for path in LIBRARY if not path.name.startswith("_")], ids=short)
def test_what_a_submodule_exports_the_package_exports(path: Path) -> None:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    exported = getattr(importlib.import_module(dotted), "__all__", [])
    missing = set(exported) - set(PACKAGES[dotted.split(".")[0]].__all__)
    assert not missing, f"{dotted} exports {sorted(missing)}, the package does not"


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_name_is_documented(package: str, name: str) -> None:
    value = getattr(PACKAGES[package], name)
    if not callable(value):
        return  # a constant has a comment
    text = inspect.getdoc(value) or ""
    assert len(text.split(".")[0].split()) >= 3, "says in a sentence what it computes"
    arguments = set(inspect.signature(value).parameters)
    if inspect.isfunction(value):
        assert not arguments or "Args:" in text
        assert "Returns:" in text or "Yields:" in text
        return
    assert value.__doc__ != value.__mro__[1].__doc__, "has a docstring of its own"
    if issubclass(value, tuple) or not arguments or "Args:" in text or "Attributes:" in text:
        return
    # a class may point to the function that explains its options
    pointer = re.search(r":func:`~?\.?(\w+)`", text)
    assert pointer, "says what its arguments are, or which function does"
    assert arguments <= set(inspect.signature(getattr(PACKAGES[package], pointer[1])).parameters)


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_function_and_module_has_an_example(package: str, name: str) -> None:
    value = getattr(PACKAGES[package], name)
    if inspect.isfunction(value) or (inspect.isclass(value) and hasattr(value, "forward")):
        assert ">>>" in (inspect.getdoc(value) or "")


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_signature_is_annotated(package: str, name: str) -> None:
    value = getattr(PACKAGES[package], name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter.name
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, "no **kwargs"


def test_the_oldest_versions_are_those_that_pyproject_allows() -> None:
    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text().partition("\ndev = ")[0]))
    tried = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / ".ci/lowest.txt").read_text(), re.MULTILINE))
    of_build_and_docs = {"hatchling", "sphinx", "furo", "myst-parser", "sphinx-gallery", "latex2mathml"}
    for name in asked.keys() - of_build_and_docs:
        assert f"{tried[name]}.0".startswith(f"{asked[name]}."), name
