"""Command lines in processes that are forked from one that has imported everything: they cost their own work only."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from recipes.cli import discover, main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", __name__, "recipes.pipeline.report", *(f"recipes.{n}" for n in discover())])


class Ended(NamedTuple):
    """Exit status, negative for the signal that ended it, and what was printed."""

    status: int
    output: str


def command(*arguments: str | Path, before: Callable[[], None] | None = None) -> Ended:
    """``python -m recipes ARGUMENTS`` on one thread; ``before()``, which has to be picklable, is called there first."""
    with tempfile.NamedTemporaryFile() as log:
        process = _CONTEXT.Process(target=_enter, args=([str(word) for word in arguments], log.name, before))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        return Ended(process.exitcode, Path(log.name).read_text())


def run(*arguments: str | Path, before: Callable[[], None] | None = None) -> str:
    """A command that has to succeed; what it printed."""
    ended = command(*arguments, before=before)
    assert ended.status == 0, ended.output
    return ended.output


def _enter(arguments: list[str], log: str, before: Callable[[], None] | None) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))
