"""Named measurements whose rows say whether a number was measured or simulated."""
