"""Requests over time: synthetic or from traces, reactive, drawn lazily and the same in both worlds."""
