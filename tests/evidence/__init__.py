"""What an issue must show, as commands: ``python -m tests.evidence ISSUE.LINE``."""
