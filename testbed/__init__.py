"""testbed: one scheduler and one set of event loops, in virtual time and on a GPU."""
