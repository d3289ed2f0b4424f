"""python -m densenet_efficient COMMAND: see `cli`."""

import sys

from .cli.commands import main

sys.exit(main())
