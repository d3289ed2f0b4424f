"""The test suite: a folder for each subpackage, and what they share in support/."""
