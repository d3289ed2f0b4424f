"""Prints how many wrong uses of each kind are tested; with a kind's name, which ones."""

from __future__ import annotations

import sys
from collections import Counter

from . import WRONG_USES

wanted = " ".join(sys.argv[1:])
if wanted:
    for use in WRONG_USES:
        if use.group == wanted:
            print(f"{use.error.__name__:16} {use.what}")
else:
    for group, count in Counter(use.group for use in WRONG_USES).items():
        print(f"{count:5} {group}")
    print(f"{len(WRONG_USES):5} together")
