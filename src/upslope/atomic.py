"""Files and folders that are either whole or absent, whatever kills the process; and reading what others wrote.

The recipe is the usual one: write under a hidden temporary name in the same folder, fsync, rename, fsync the folder.
A killed process leaves only hidden temporary entries behind; `clean_leftovers` removes those of dead processes.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from upslope.errors import RunError, UpslopeError

_PREFIX = ".upslope-tmp-"
_TEMPORARY = re.compile(re.escape(_PREFIX) + r"(\d+)-([0-9a-f]+)-")
_TOKEN = secrets.token_hex(4)
_COUNTER = itertools.count()
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def disk_error(error: OSError, path: Path, action: str = "write") -> RunError:
    """The one-line RunError that a failed disk operation on `path` becomes; the errno decides the remedy."""
    if error.errno in _FULL:
        return RunError(
            f"{path}: cannot {action}: the disk is full; what was saved before is untouched: "
            "free some space (or choose another --output-dir), then continue with --resume"
        )
    if error.errno in _FORBIDDEN:
        return RunError(f"{path}: cannot {action}: not writable; choose another --output-dir or change the permissions")
    return RunError(f"{path}: cannot {action}: {error.strerror or error}")


def refuse_other_than_file(path: Path) -> None:
    """RunError for a link, a pipe, a folder or a device where a file is to be written in place; absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise RunError(f"{path}: {kind} where a plain file must be; nothing is written through it: move it away")


def check_plain(path: Path, most: int | None = None, remedy: str = "split it") -> None:
    """OSError, in words, for what is no plain file to read from, or has more than `most` bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"a {'folder' if path.is_dir() else 'pipe or device'}, not a plain file")
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, at most {most:,}; {remedy}")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of the plain file at `path`, made (for its owner alone, whatever the umask) where there is none.

    Never follows a link and never waits. Raises RunError for what is no plain file, OSError as `os.open`.
    """
    refuse_other_than_file(path)
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


@contextmanager
def saving(path: Path, action: str = "write") -> Iterator[None]:
    """Turns an OSError of the block into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, action) from error


def fsync_folder(folder: Path) -> None:
    """Makes the folder's entries (creations, renames) durable."""
    try:
        fsync_file(folder)
    except OSError as error:
        # Some network filesystems cannot fsync a folder; there the rename itself is the strongest promise to be had.
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def fsync_file(path: Path) -> None:
    """Makes the content of a file written by someone else (a library) durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Replaces the file at `path` in one step: a reader, or a kill at any moment, sees the old content or the new.

    The new file may be read by whom the old one could be. A link at `path` is replaced, not what it leads to.

    Args:
        path: the file; its folder must exist.
        content: bytes, text (written as UTF-8) or a function that writes into the open binary file.

    Raises:
        RunError: unwritable folder or full disk; the old file is untouched.
    """
    path = Path(path)
    with saving(path), replacing(path) as temporary, open(temporary, "xb") as file:
        if path.is_file() and not path.is_symlink():
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden name beside `path`; what the block makes there takes the place of `path`, durably."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def publish_folder(target: Path | str) -> Iterator[Path]:
    """Yields a hidden folder to fill; when the block ends, every file is fsynced and the folder takes its name.

    When the block raises, nothing is left behind. `target` must not exist; its parent is made.

    Raises:
        RunError: unwritable parent, full disk, or `target` exists.
    """
    target = Path(target)
    with saving(target):
        if target.exists():
            raise RunError(f"{target}: already exists; remove it or choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            os.mkdir(temporary)
            yield temporary
            fsync_tree(temporary)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that no moment shows it half deleted under its own name; of a link to one, the link alone."""
    with saving(path, "remove"):
        if path.is_symlink():
            path.unlink()
            return
        temporary = _temporary(path)
        os.rename(path, temporary)
        shutil.rmtree(temporary)


def point_to(pointer: Path, name: str) -> None:
    """Makes `pointer` a relative symbolic link to its sibling `name`, switched in one step.

    On a filesystem without symbolic links it is a text file that holds the name; `read_pointer` reads both.
    """
    with saving(pointer):
        try:
            with replacing(pointer) as temporary:
                os.symlink(name, temporary)
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
                raise
            write_atomic(pointer, name + "\n")


def read_pointer(pointer: Path) -> str | None:
    """The name that `point_to` stored, or None when there is none."""
    with saving(pointer, "read"):
        if pointer.is_symlink():
            return os.readlink(pointer)
        return pointer.read_text().strip() if pointer.is_file() else None


def is_temporary(name: str) -> bool:
    """True for the names under which this module hides what is not finished."""
    return name.startswith(_PREFIX)


def clean_leftovers(folder: Path, *, exclusive: bool = False) -> list[Path]:
    """Removes what killed processes left unfinished directly in `folder`; returns what was removed.

    Entries of another living process are kept, it may be writing them; unless `exclusive`: the caller holds the lock
    that every writer of the folder needs, so that the process id must since have gone to someone else.
    """
    removed: list[Path] = []
    with saving(folder, "clean"):
        if not folder.is_dir():
            return removed
        for path in sorted(folder.iterdir()):
            match = _TEMPORARY.match(path.name)
            if not match or _in_use(int(match[1]), match[2], exclusive):
                continue
            _remove(path)
            removed.append(path)
    return removed


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_PREFIX}{os.getpid()}-{_TOKEN}-{next(_COUNTER)}-{path.name[-80:]}")


def _in_use(pid: int, token: str, exclusive: bool) -> bool:
    if pid == os.getpid() or exclusive:
        # In containers every process may have the same id: the token tells this process from an earlier one.
        return pid == os.getpid() and token == _TOKEN
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def fsync_tree(folder: Path) -> None:
    """Makes a folder and all that is in it durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync_file(Path(root, name))
        fsync_folder(Path(root))


LARGEST = 1 << 28  # bytes; the largest tokenizers have some 35 MB
DEEPEST = 64


def read_object(path: Path, error: type[UpslopeError], remedy: str = "get the file again") -> dict[str, Any]:
    """The file's JSON object.

    Raises `error`, naming file and remedy: unreadable, more than LARGEST bytes, not UTF-8, not JSON, a key given twice
    in one object, nested more than DEEPEST deep, not an object.
    """
    try:
        check_plain(path)
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
        level, depth = [value], 0
        while level := [
            x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]:
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}; {remedy}") from problem
    except ValueError as problem:
        raise error(f"{path}: cannot be read as JSON ({problem}); {remedy}") from problem
    except RecursionError as problem:
        raise error(f"{path}: cannot be read as JSON (nested too deeply); {remedy}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds no JSON object; {remedy}")
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        made[key] = value
    return made
