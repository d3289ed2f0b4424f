"""Property-based tests: what they draw (`structures`, `layouts`), how they run it (`surroundings`),
how they judge it (`judgement`; in low precision `precision`, at the values of `statistics`), and
how many examples there are (`profile`).

    make fuzz N=2000 [SEED=1]     N examples of modules and N calls of operators (`operators`);
                                  the seed is printed
    make test                     160 and 200, the same every time: none in low precision, of which
                                  some still err more than PyTorch's (tests/README.md)
"""
