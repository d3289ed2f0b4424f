"""python -m densenet_efficient COMMAND: see `cli`."""

import sys

from .cli import main

sys.exit(main())
