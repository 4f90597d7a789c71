"""Where the time of a whole recipe goes: run it stage by stage under a sampling profiler.

python -m tests.benchmarks.profile irn --stages labels relations masks -- --preset small --data voc:PATH --reuse RUN

What follows ``--`` are flags of the recipe. Each stage is a run of its own that ends with it, so that stages that are
finished or taken from another run cost nothing. Needs `py-spy`, which looks at the process from outside and slows it
down little. Writes docs/data/profiles/NAME.json and docs/profiles.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from recipes.pipeline.files import write_text

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STORED = DOCS / "data" / "profiles"
OURS = ("wsss_losses/", "wsss_modules/", "recipes/")
WAITS = ("threading.py", "queue.py", "selectors.py", "connection.py")  # threads that wait
SHOWN = 8


def parse(line: str) -> tuple[list[tuple[str, str]], int]:
    """A line of py-spy's raw format: the stack, outermost first, as (function, file), and how often it was seen."""
    stack, seen = line.rsplit(" ", 1)
    frames = (re.fullmatch(r"(.+) \((.+?)(?::\d+)?\)", frame) for frame in stack.split(";"))
    return [(frame[1], frame[2]) for frame in frames if frame], int(seen)


def tally(raw: str) -> tuple[Counter[tuple[str, str]], int]:
    """Samples by (our innermost function, what it called of others), and their number, without threads that wait."""
    found: Counter[tuple[str, str]] = Counter()
    for line in raw.splitlines():
        stack, seen = parse(line)
        if not stack or stack[-1][1].endswith(WAITS):
            continue
        ours = [(function, file) for function, file in stack if file.startswith(OURS)]
        function, file = ours[-1] if ours else ("start of the process", "")
        leaf = stack[-1][0] if not ours or stack[-1] != ours[-1] else ""
        found[f"{file} {function}".strip(), leaf] += seen
    return found, sum(found.values())


def profile(recipe: str, stage: str, flags: list[str], rate: int) -> dict:
    """Run a recipe up to a stage under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks"
        spy = ["py-spy", "record", "--format", "raw", "--rate", str(rate), "--output", str(raw), "--"]
        command = [sys.executable, "-m", "recipes", "run", recipe, *flags, "--until", stage]
        done = subprocess.run([*spy, *command], cwd=ROOT, check=False, capture_output=True, text=True)
        if done.returncode != 0 or not raw.exists():
            raise SystemExit(f"{stage}: the run failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found, samples = tally(raw.read_text())
    rows = [{"ours": ours, "calls": leaf, "share": seen / samples} for (ours, leaf), seen in found.most_common(SHOWN)]
    return {"seconds": samples / rate, "rows": rows}


def page(profiles: Mapping[str, dict]) -> str:
    """Profiles by recipe in Markdown; stages that ran under other conditions than the first say under which."""
    parts = [
        "# Profiles\n\nWritten by `python -m tests.benchmarks.profile`: whole recipes under py-spy, stage by stage. A "
        "row is the innermost function of this library, or of the recipes, that a busy thread was in, and what it had "
        "called; seconds are of busy threads, so two threads at work for a second count two. Only the process of the "
        "run is looked at: what its loader processes do, reading and augmenting images, is left out.\n"
    ]
    for recipe, stored in profiles.items():
        conditions = {stage: _told(conditions_of(stored, stage)) for stage in stored["stages"]}
        first = next(iter(conditions.values()), "")
        parts.append(f"## {recipe}\n\n{first}\n")
        for stage, result in stored["stages"].items():
            parts.append(f"### {stage}: {result['seconds']:,.0f} s\n")
            if conditions[stage] != first:
                parts.append(f"{conditions[stage]}\n")
            parts.append("| where | calls | share |\n| --- | --- | --: |")
            parts += [f"| `{r['ours']}` | {r['calls'] or '-'} | {100 * r['share']:.1f} % |" for r in result["rows"]]
            parts.append("")
    return "\n".join(parts)


def conditions_of(stored: dict, stage: str) -> dict[str, str]:
    """Under which conditions a stage ran; files of before each stage had its own have one set for all."""
    return stored["stages"][stage].get("conditions", stored.get("conditions", {}))


def _told(conditions: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def keep(stored: dict, stage: str, result: dict, conditions: dict[str, str]) -> dict:
    """``stored`` with a stage profiled anew; the others keep the conditions that they ran under."""
    stages = {name: {**found, "conditions": conditions_of(stored, name)} for name, found in stored["stages"].items()}
    return {"stages": {**stages, stage: {**result, "conditions": conditions}}}


def main() -> None:
    """Profile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--stages", nargs="+", required=True, help="in their order")
    parser.add_argument("--rate", type=int, default=50, help="samples a second")
    parser.add_argument("--note", default="", help="a condition to name in the table, e.g. what else ran")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if shutil.which("py-spy") is None:
        parser.error("py-spy is not installed: pip install py-spy")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    conditions = {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **({"beside": options.note} if options.note else {}),
    }
    file = STORED / f"{options.recipe}.json"
    stored = json.loads(file.read_text()) if file.exists() else {"stages": {}}
    for stage in options.stages:
        result = profile(options.recipe, stage, flags, options.rate)
        stored = keep(stored, stage, result, conditions)
        print(f"{stage}: {result['seconds']:.0f} s", flush=True)
        write_text(file, json.dumps(stored, indent=1) + "\n")
        profiles = {path.stem: json.loads(path.read_text()) for path in sorted(STORED.glob("*.json"))}
        write_text(DOCS / "profiles.md", page(profiles))


if __name__ == "__main__":
    main()
