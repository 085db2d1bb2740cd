"""Compiled kernels on disk: one process builds an entry, all others load it.

The folder is in the user's cache directory, or the one that ``RWKV_CACHE_DIR`` names. Code is loaded from it, so it
has to be the user's own, and an entry says what it is: its name ``<key>-<digest>.so`` holds a hash of all that went
into it and the hash of its content. A file that was cut short would otherwise end the process with SIGBUS when mapped.
"""

import functools
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import filelock
import platformdirs

LOCK_SECONDS = 600  # a process that waits longer for another's compiler builds its own copy
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

T = TypeVar("T")


class KernelWarning(RuntimeWarning):
    """Native kernels are not what they could be: the message says why, and what to do."""


def digest(*parts: bytes | str) -> str:
    """A name for these parts, of 32 hexadecimal digits."""
    digests = (hashlib.sha256(part.encode() if isinstance(part, str) else part).digest() for part in parts)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def obtain(key: str, suffix: str, build: Callable[[Path], None], load: Callable[[Path], T]) -> T:
    """``load`` a file that ``build`` wrote: from the cache, or past it where the cache does not work.

    Warns of a cache that does not work. What ``build`` and, past the cache, ``load`` raise is passed on.
    """
    folder, obstacle = folder_or_reason()
    if folder is not None:
        try:
            return load(_entry(folder, key, suffix, build))
        except OSError as error:  # a full, read-only or noexec disk, no locks, a folder where a file should be
            obstacle = f"The cache of compiled kernels cannot be used: {error}."
    with tempfile.TemporaryDirectory(prefix="rwkv-") as private:  # a mapped library outlives its file
        path = Path(private) / f"{key}{suffix}"
        build(path)
        loaded = load(path)
    warn_once(f"{obstacle} Kernels are compiled anew in each process; set RWKV_CACHE_DIR to a folder of your own.")
    return loaded


@functools.cache
def warn_once(message: str) -> None:
    """Once, however many kernels there are."""
    warnings.warn(message, KernelWarning, stacklevel=3)


def folder_or_reason() -> tuple[Path | None, str]:
    """The folder of the cache; or None, where it is not this user's alone to write, and the reason."""
    chosen = os.environ.get("RWKV_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("modeling-rwkv")
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.exists():
                parent.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve(strict=True)
        info = folder.stat()
        replaceable = next((parent for parent in folder.parents if _anybody_may_rename_in(parent)), None)
    except OSError as error:
        return None, f"The cache of compiled kernels cannot be created: {error}."
    if info.st_uid != os.geteuid():
        return None, f"The cache of compiled kernels, {folder}, belongs to another user."
    if info.st_mode & OTHERS_WRITE:
        return None, f"Others can write to {folder}, the cache of compiled kernels: run 'chmod go-w {folder}'."
    if replaceable:
        return None, f"Others can write to {replaceable}, above the cache of compiled kernels: run 'chmod o-w' on it."
    return folder, ""


def _anybody_may_rename_in(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _entry(folder: Path, key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The valid entry of a key. One process builds it, and the others wait."""
    if found := _find(folder, key, suffix):
        return found
    with filelock.FileLock(folder / f"{key}.lock", timeout=LOCK_SECONDS):
        if found := _find(folder, key, suffix):
            return found
        for invalid in folder.glob(f"{key}-*"):
            invalid.unlink()
        unfinished = folder / f"{key}.tmp{suffix}"  # under the lock: if it is there, its writer is gone
        unfinished.unlink(missing_ok=True)
        try:
            build(unfinished)
            unfinished.chmod(0o600)  # whatever the umask: what others may write is not loaded
            entry = folder / f"{key}-{digest(unfinished.read_bytes())}{suffix}"
            os.replace(unfinished, entry)
        finally:
            unfinished.unlink(missing_ok=True)
        return entry


def _find(folder: Path, key: str, suffix: str) -> Path | None:
    for path in folder.glob(f"{key}-*{suffix}"):
        with suppress(FileNotFoundError):  # another process may remove an invalid one right now
            info = path.lstat()
            private = info.st_uid == os.geteuid() and not info.st_mode & OTHERS_WRITE
            if stat.S_ISREG(info.st_mode) and private and path.stem == f"{key}-{digest(path.read_bytes())}":
                return path
    return None
