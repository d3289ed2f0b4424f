"""The command line, `python -m densenet_efficient COMMAND`: a module for each group of commands.
May import everything; nothing imports it."""
