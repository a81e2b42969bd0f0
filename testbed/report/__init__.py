"""Tables, figures, pages and traces of runs, whoever ran them."""

from testbed.report.page import write_report
from testbed.report.trace import write_trace

__all__ = ["write_report", "write_trace"]
