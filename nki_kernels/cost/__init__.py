"""What a kernel costs, without the chip: counters and a schedule that listen to a simulated run. Simulated
throughout, never measured.
"""
