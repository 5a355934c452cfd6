"""The errors a user of upslope can meet: one base and four kinds, each also a standard-library type.

Every message is one line that says where (file, row, key), what, and what to do about it.
The command line prints the message and exits with the class's `exit_code`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UpslopeError(Exception):
    """Base of every error raised on purpose by this project."""

    exit_code = 1

    def __str__(self) -> str:
        """One line of bounded length: messages quote names and values of files."""
        return one_line(super().__str__(), 1200)


class ConfigError(UpslopeError, ValueError):
    """An option, a configuration file or the installation is wrong (unknown key, bad range, missing extra)."""

    exit_code = 2


class DataError(UpslopeError, ValueError):
    """A data file, a chat template, a task or a reward returned something unusable."""

    exit_code = 3


class ModelError(UpslopeError, ValueError):
    """A model source cannot be found, read or run (missing weights, wrong shapes, unsupported architecture)."""

    exit_code = 4


class RunError(UpslopeError, RuntimeError):
    """A run cannot start, continue or save (unwritable folder, full disk, non-finite loss, bad checkpoint)."""

    exit_code = 5


KINDS = (ConfigError, DataError, ModelError, RunError)


@contextmanager
def located(where: object, kind: type[UpslopeError] = UpslopeError) -> Iterator[None]:
    """An error of the block, of that kind, becomes one whose message begins with `where`."""
    try:
        yield
    except kind as error:
        raise next(k for k in KINDS if isinstance(error, k))(f"{where}: {error}") from error


def is_rust_error(error: BaseException) -> bool:
    """Whether the tokenizers' Rust code raised it: a bare Exception, or a panic, which is not even that."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def one_line(said: object, most: int = 300) -> str:
    """A message, or what an error says, as one line of at most so many characters.

    Control characters are escaped, and what is cut is its middle. An error that says nothing is named by its type.
    """
    text = str(said) or (type(said).__name__ if isinstance(said, BaseException) else "")
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text[: 100 * most].split()))
    return line if len(line) <= most else f"{line[: most * 2 // 3]}…{line[-(most // 3) + 1 :]}"
