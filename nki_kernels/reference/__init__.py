"""What every kernel must return, in NumPy: same names, plain `[out, in]` weights instead of packed ones."""
