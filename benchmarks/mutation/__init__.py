"""Small faults put into floors 0 to 2 of the library, to see whether the tests notice them.

    python -m benchmarks.mutation [--sample N] [--seed S] [--json PATH] [MODULE ...]

Each mutant is one changed operator, number, condition, argument, returned value or dropped call, in
a copy of the tree, under the tests that belong to its module; docs/testing.md has the figure.
"""
