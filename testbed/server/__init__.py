"""The server: HTTP workers, the scheduler's process and the detokenizer, and what they send one another."""
