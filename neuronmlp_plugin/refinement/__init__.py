"""Move the numbers of the factors, never their shapes, until the compressed model is closer to the dense one;
keep what is better.
"""
