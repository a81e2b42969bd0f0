"""`testbed calibrate`: this device and this host, measured with the engine itself."""
