"""Reads a kernel as the compilers of nki 0.2 to 0.6 do, and says what they would refuse: see
`verdict.check`.
"""
