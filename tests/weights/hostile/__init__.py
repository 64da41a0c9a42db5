"""Hostile files: mutants of every format, their readers, and independent readers to compare with.

A mutant is one file or folder with one thing wrong, made from a seed and a number. Reading it must
end in a JaxtcError, or in exactly what the mutant says by another reader; see :mod:`child`.
"""
