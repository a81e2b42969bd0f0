"""Our own checks of replies, for schemathesis to load."""

from __future__ import annotations

import schemathesis

from tests.server.hostile.verdict import Reply, objection


@schemathesis.check
def tells_nothing_of_its_inside(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Also: no status from 500 on but 503 with Retry-After, and errors that are error objects."""
    headers = {name.lower(): ", ".join(values) for name, values in response.headers.items()}
    objected = objection(Reply(response.status_code, headers, response.content), bodiless=case.method == "HEAD")
    if objected is not None:
        raise AssertionError(objected)
