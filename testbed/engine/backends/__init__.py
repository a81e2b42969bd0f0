"""Device operations of a model behind one interface: ``torch`` (the reference, runs anywhere) and ``triton``."""
