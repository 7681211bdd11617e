"""One file a sub-command of `neuronmlp`: `add_arguments(parser)` and `run(args) -> exit code`; heavy imports
wait for `run`.
"""
