"""Traces: files of recorded or prepared requests, read row by row, described, and fetched from their origin."""

from testbed.workload.traces.known import KNOWN_TRACES, KnownTrace, fetch_trace
from testbed.workload.traces.reader import find_trace, read_trace
from testbed.workload.traces.rows import TraceRow
from testbed.workload.traces.stats import trace_stats

__all__ = ["KNOWN_TRACES", "KnownTrace", "TraceRow", "fetch_trace", "find_trace", "read_trace", "trace_stats"]
