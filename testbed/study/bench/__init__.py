"""Drive any OpenAI-compatible server with a scenario's workload, and record what its clients saw."""

from testbed.study.bench.client import bench
from testbed.study.bench.wire import Server

__all__ = ["Server", "bench"]
