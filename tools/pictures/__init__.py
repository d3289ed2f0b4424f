"""The pictures of the documentation, drawn from stored results or computed by the package:

    python -m tools.pictures                   draw all of them again
    python -m tools.pictures --output FOLDER   elsewhere

`measured` draws what benchmarks stored, `computed` what the package knows without running a step;
`live` follows the memory of plain models.
"""
