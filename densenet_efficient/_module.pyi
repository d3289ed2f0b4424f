"""Types of the compiled module, csrc/module.cpp."""

__version__: str

def build_info() -> dict[str, str]: ...
