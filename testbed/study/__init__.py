"""What one does with runs: compare them, and later sweep, calibrate, confirm, replay."""
