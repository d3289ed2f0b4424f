"""Property-based tests: what they draw (`structures`, `layouts`), how they run it (`surroundings`),
how they judge it (`judgement`), and how many examples there are (`profile`).

    make fuzz N=2000 [SEED=1]     N examples of modules and N calls of operators (`operators`);
                                  the seed is printed
    make test                     200 examples, the same every time
"""
