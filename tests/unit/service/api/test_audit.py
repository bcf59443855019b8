"""GET /v1/audit."""

from __future__ import annotations

from collections.abc import Callable

from kdscale.service.database.runs import Run
from tests.unit.service.api.conftest import Caller


def test_an_admin_reads_who_did_what(as_: Caller, make_run: Callable[..., Run]) -> None:
    run = make_run()
    as_("bob").post(f"/v1/runs/{run.id}/cancel")
    as_("ada").post(f"/v1/runs/{run.id}/cancel")
    admin = as_("admin")
    first = admin.get("/v1/audit", params={"limit": 1}).json()
    second = admin.get("/v1/audit", params={"limit": 1, "after": first["next"]}).json()
    lines = [*first["items"], *second["items"]]
    assert [(line["actor"], line["detail"]["status"]) for line in lines] == [("ada", 200), ("bob", 403)]
    assert {line["action"] for line in lines} == {"POST /v1/runs/{run_id}/cancel"}
    assert {line["run_id"] for line in lines} == {run.id}
    assert all(line["detail"]["token_id"] not in ("", "***") for line in lines)
    assert as_("ada").get("/v1/audit").status_code == 403
