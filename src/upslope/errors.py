"""The errors a user of upslope can meet: one base and four kinds, each also a standard-library type.

Every message is one line that says where (file, row, key), what, and what to do about it.
The command line prints the message and exits with the class's `exit_code`.
"""

from __future__ import annotations

MESSAGE = 1200


def one_line(error: object) -> str:
    """What an error says, in at most 300 characters of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class UpslopeError(Exception):
    """Base of every error raised on purpose by this project."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, its middle left out beyond MESSAGE characters: messages quote names and values of files."""
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= MESSAGE else f"{text[: MESSAGE * 2 // 3]} ... {text[-MESSAGE // 3 :]}"


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
