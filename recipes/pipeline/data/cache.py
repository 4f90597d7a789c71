"""A folder for what is made once and read often: the demo pictures, the index of COCO's annotations."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """A folder that `build` has filled, made on first use.

    It lies in $WSSS_CACHE, else in ~/.cache/wsss. `build` fills a temporary folder, which is renamed when it is
    complete: whoever is killed on the way leaves nothing that could be taken for the real one, and of two processes
    that build at once the first to finish wins.

    Args:
        name: Name of the folder; has to change when its content does.
        build: Called with an empty folder to fill.
    """
    root = Path(os.environ.get("WSSS_CACHE") or Path.home() / ".cache" / "wsss").expanduser()
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        build(draft)
        draft.chmod(0o755)  # mkdtemp makes it private
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
