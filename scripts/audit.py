"""Look up every pin of requirements/ in the advisories of the package index: the last step of `make check`.

A mirror need not have advisories, and some machines reach none: then that is said, and it is no failure, since the
checks must run without a network. A known vulnerability is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lock


def main() -> int:
    """1 where a pin has a known vulnerability, else 0; one line of what was looked up."""
    files = [word for name in lock.FILES for word in ("-r", str(lock.OUT / name))]
    program = Path(sys.executable).with_name("pip-audit")
    command = [program, "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        pins = json.loads(done.stdout)["dependencies"]
    except ValueError:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        print(f"audit: the advisories could not be read, so no pin was looked up: {said}")
        return 0
    found = [
        f"{pin['name']} {pin['version']}: {bad['id']}, mended in {', '.join(bad['fix_versions']) or 'no version yet'}"
        for pin in pins
        for bad in pin.get("vulns", [])
    ]
    unknown = sum("skip_reason" in pin for pin in pins)
    print(*found, sep="\n", end="\n" if found else "")
    print(
        f"audit: {len(pins) - unknown} of {len(pins)} pins looked up, {len(found)} known vulnerabilities"
        + (f"; this package index has no advisories on the other {unknown}" if unknown else "")
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
