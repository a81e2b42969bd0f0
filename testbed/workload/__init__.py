"""Requests over time: synthetic or from traces, reactive, drawn lazily and the same in both worlds."""

from testbed.workload.base import TimedRequest, Workload
from testbed.workload.build import build_workload

__all__ = ["TimedRequest", "Workload", "build_workload"]
