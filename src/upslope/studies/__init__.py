"""What runs recipes."""

from pathlib import Path

from upslope.errors import RunError


def new_folder(folder: Path, remedy: str) -> Path:
    """The folder, made where it is not there. RunError: it cannot be made, or something is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(folder.iterdir(), None)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}; {remedy}") from None
    if occupied:
        raise RunError(f"{folder}: is not empty; {remedy}")
    return folder
