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
    sent = response.request.body or b""
    told = Reply(response.status_code, headers, response.content)
    objected = objection(told, sent.encode() if isinstance(sent, str) else sent, bodiless=case.method == "HEAD")
    if objected is not None:
        raise AssertionError(objected)
