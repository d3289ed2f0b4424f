"""The command line, `python -m densenet_efficient`. May import everything; nothing imports it."""
