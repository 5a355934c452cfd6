"""Run a command as on a machine that has never seen the project: python3 scripts/stranger.py make test

HOME is empty, nothing is cached, and this machine's own settings of pip are gone (wheel folders, further indexes,
constraints). Only the way to the package index stays: its address, certificates, a proxy. Standard library only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WAY = ("index-url", "cert", "client-cert", "proxy", "trusted-host")
OWN = re.compile(r"(PIP|UV|XDG|HF|UPSLOPE)_(?!TEST_)|PYTHONPATH$|VIRTUAL_ENV$")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a stranger whose HOME and caches are new folders in `folder`."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = dict(re.findall(r"^global\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    variables = {name: value for name, value in os.environ.items() if not OWN.match(name)}
    for key in WAY:
        name = f"PIP_{key.upper().replace('-', '_')}"
        value = os.environ.get(name) or settings.get(key)
        if value:
            variables[name] = value
    for name, place in (("HOME", "home"), ("XDG_CACHE_HOME", "cache")):
        (folder / place).mkdir()
        variables[name] = str(folder / place)
    return variables | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as new:
        sys.exit(subprocess.run(sys.argv[1:], env=environment(Path(new))).returncode)
