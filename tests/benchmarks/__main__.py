"""Run all benchmarks, one process each, and write docs/benchmarks.md and docs/data/benchmarks.json.

python -m tests.benchmarks [NAME ...] [--device cuda] [--note "what else ran"]

Each compares its forms first; one whose values differ ends without figures and is named as such. With names, e.g. rca
c2am, only these are run and the others keep the figures that they have. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
STORED = DOCS / "data" / "benchmarks.json"


def names() -> list[str]:
    """All benchmarks."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def run(name: str, device: str) -> dict:
    """What a benchmark has stored, and the lines that it printed about its ratios; or why it has no figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"tests.benchmarks.bench_{name}", "--json", str(file)]
        command += [] if device == "cpu" else ["--device", device]
        done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not file.exists():
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            return {"title": name, "failed": last}
        said = [line.strip() for line in done.stdout.splitlines() if "times" in line]
        return {**json.loads(file.read_text()), "said": said}


def page(results: dict[str, dict]) -> str:
    """The results in Markdown."""
    parts = [
        "# Benchmarks\n\nWritten by `python -m tests.benchmarks`. Each case runs our form beside the naive or released "
        "one in one process; values are compared first, and a case whose values differ is not reported. Median of "
        "several calls by the clock, of ReviewKD and PSA by the processor's; memory is the growth of the process (on a "
        "GPU, of the allocator) over one call. The machine is shared and its speed changes: compare the rows of a "
        "section with each other, not with those of another day.\n"
    ]
    for name, result in results.items():
        parts.append(f"## {result['title']}\n\n`python -m tests.benchmarks.bench_{name}`\n")
        if "failed" in result:
            parts.append(f"No figures: `{result['failed']}`\n")
            continue
        told = ", ".join(f"{key} {value}" for key, value in result["conditions"].items())
        parts.append(f"{told}\n\n| case | time | memory |\n| --- | --: | --: |")
        parts += [f"| {r['name']} | {r['seconds'] * 1e3:,.2f} ms | {r['peak_mb']:,.1f} MB |" for r in result["rows"]]
        parts.append("")
        parts += [f"- {line}" for line in result["said"]]
        parts += [""] if result["said"] else []
    return "\n".join(parts)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="a condition to name in the page, e.g. what else ran")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser.error(f"NAME: expected some of {', '.join(names())}, got {', '.join(unknown)}")
    results = json.loads(STORED.read_text()) if STORED.exists() else {}
    memory = psutil.virtual_memory().total / 1e9
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB"
    for name in options.names or names():
        print(f"{name} ...", end=" ", flush=True)
        results[name] = run(name, options.device)
        print(results[name].get("failed", f"{len(results[name].get('rows', []))} cases"), flush=True)
        if "conditions" in results[name]:
            results[name]["conditions"]["machine"] = machine
            results[name]["conditions"] |= {"beside": options.note} if options.note else {}
        results = {key: results[key] for key in sorted(results) if key in names()}
        STORED.write_text(json.dumps(results, indent=1) + "\n")
        (DOCS / "benchmarks.md").write_text(page(results))


if __name__ == "__main__":
    main()
