"""python -m densenet_efficient COMMAND: see `cli`."""

import sys

from .cli.main import main

sys.exit(main())
