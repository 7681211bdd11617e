"""Runs our NKI subset on numpy, refuses what the hardware would refuse, and emits a trace."""
