"""Weight and statistics in, factors and their error out. Tensors only: no models, no files, nothing of ours
but the errors.
"""
