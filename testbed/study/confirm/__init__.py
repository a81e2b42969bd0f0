"""`testbed confirm`: a scenario simulated and run, joined."""
