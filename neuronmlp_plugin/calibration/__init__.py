"""Text in, statistics out: what each MLP sees and how its output matters, streamed layer by layer, and how
good a model is.
"""
