"""What a run leaves behind, and the figures that follow from it."""
