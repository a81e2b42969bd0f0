"""What time is: virtual (SimPy), the wall clock, or a recording."""
