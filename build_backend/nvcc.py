"""Runs one nvcc command, keeps ptxas's resource report next to the object, and judges its notes.

    python nvcc.py REPORT -- nvcc ...

ptxas says in a mere note that it serialised wgmma instructions; such a kernel is several times
slower than the one that was written, so the note ends the compilation.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    report, separator, *command = sys.argv[1:]
    if separator != "--":
        raise SystemExit("usage: nvcc.py REPORT -- COMMAND...")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    resource_lines = ("ptxas info", "    ")
    other = [line for line in done.stdout.splitlines() if not line.startswith(resource_lines)]
    serialised = [
        line
        for line in done.stdout.splitlines()
        if "wgmma" in line and "serializ" in line.replace("serialis", "serializ")
    ]
    if done.returncode:
        print(done.stdout)
        return done.returncode
    if other:
        print("\n".join(other))
    if serialised:
        print("error: ptxas serialised wgmma instructions:", *serialised, sep="\n  ")
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
        return 1
    Path(report).write_text(done.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
