"""How far simulation is from life, measured: ``python -m tests.fidelity paced|cpu|gpu`` writes ``reports/fidelity``."""
