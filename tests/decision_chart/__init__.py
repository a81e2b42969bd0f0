"""Which loop wins where, simulated: ``python -m tests.decision_chart`` writes ``reports/decision_chart``."""
