"""Exit 0 when this Python can build a C extension here: a compiler and the Python headers are present."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path


def can_compile() -> bool:
    """True with a C compiler on the path and Python.h where this interpreter expects it."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(compiler) is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


if __name__ == "__main__":
    sys.exit(0 if can_compile() else 1)
