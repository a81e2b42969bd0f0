"""The engine's own operators and steps, timed one by one on the device that runs them (``testbed calibrate``)."""
