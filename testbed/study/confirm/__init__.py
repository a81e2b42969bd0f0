"""``testbed confirm``: a scenario simulated and run, joined.

``run`` says what is run, ``errors``, ``decisions``, ``executor`` and ``ranking`` join, ``findings`` judges.
"""
