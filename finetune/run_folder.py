"""The folder of a run: whose it is, and which of its checkpoints can be trusted.

`run.json` records the recipe that a run was started with, so that nothing else is continued or
overwritten by mistake. A checkpoint counts once it holds a file `complete`, which is written
after everything else; a kill leaves either a complete checkpoint or one that is ignored.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rwkv_finetune.arguments import Refusal

COMPLETE = "complete"


def claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Create `folder` for `recipe` (JSON values), or see that it was created for the same one.

    Raises:
        Refusal: it is a file, cannot be made, holds something else, or was started with another recipe.
    """
    record = folder / "run.json"
    recipe = json.loads(json.dumps(recipe))
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"output_dir {folder} is a file; name a folder")
    if not record.exists():
        if folder.exists() and any(path != unfinished(record) for path in folder.iterdir()):
            raise Refusal(f"output_dir {folder} holds files of something else; choose a new one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"output_dir {folder} cannot be made: {error.strerror}; choose another place") from error
        unfinished(record).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished(record), record)
        return
    started = json.loads(record.read_text(encoding="utf-8"))
    for key in sorted(recipe.keys() | started.keys()):
        if recipe.get(key) != started.get(key):
            raise Refusal(
                f"output_dir {folder} was started with {key} = {started.get(key)}, not "
                f"{recipe.get(key)}; use that value or another output_dir"
            )


def unfinished(path: Path) -> Path:
    """Where to write what is to appear at `path` all at once, by `os.replace`."""
    return path.with_name(path.name + ".unfinished")


def sha256(path: str | Path) -> str:
    """Of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint complete, once all of it has reached the disk."""
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    (checkpoint / COMPLETE).touch()


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark first: what a kill leaves of it is ignored."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
