import re
from pathlib import Path

from recipes.cli import discover

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ten_lines_of_the_readme_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mask"].shape == (1, 128, 128)
    assert set(names["mask"].unique().tolist()) <= {0, 1, 2}


def test_readme_lists_every_recipe_and_links_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert all((ROOT / link).exists() for link in links), links
    assert {f"recipes/{name}.py" for name in discover()} <= set(links)


def test_each_recipe_has_a_row_in_the_table_of_systems_which_says_where_it_ran() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:2] == "| "]
    verified = {row[3]: row[4] for row in rows if len(row) == 5}
    for name in discover():
        found = verified[f"[{name}](recipes/{name}.py)"]
        assert ("photographs" in found) == any((ROOT / "docs" / "data" / "runs").glob(f"{name}-*.json")), name


def test_readme_has_exactly_two_set_up_commands() -> None:
    commands = [line for line in README.splitlines() if "pip install" in line and line.startswith("python3 -m venv")]
    assert [command.rsplit(" && ", 1)[1] for command in commands] == [
        "python -m recipes run irn",
        "python -m pytest -q -n 2 --dist worksteal",
    ]
