"""The client's own models are those of the service's description, member by member."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from kdscale.client import models
from kdscale.service import states

PAIRS: dict[type[BaseModel], str] = {
    models.Stage: "StageState", models.Run: "RunSummary", models.RunDetail: "RunDetail", models.Event: "RunEvent",
    models.Series: "Series", models.Metrics: "Metrics", models.Artifact: "ArtifactEntry", models.Refusal: "Refusal",
    models.Estimate: "Estimate", models.Verdict: "Verdict", models.Page[models.Run]: "ListOf_RunSummary_",
}  # fmt: skip


@pytest.mark.parametrize("model", PAIRS, ids=lambda model: model.__name__)
def test_members_have_the_names_and_types_of_the_service(app: FastAPI, model: type[BaseModel]) -> None:
    described = app.openapi()["components"]["schemas"]
    theirs, ours = described[PAIRS[model]]["properties"], model.model_json_schema(mode="serialization")
    for name, member in ours["properties"].items():
        assert name in theirs, f"the service has no {name}"
        assert _kinds(member, ours.get("$defs", {})) == _kinds(theirs[name], described), name
    assert set(theirs) - set(ours["properties"]) <= {"links", "notices"}


def test_states_are_those_of_the_service() -> None:
    assert models.STATES == states.STATES
    assert models.ENDED == states.FINAL


def _kinds(member: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """What a member may hold, without its names and descriptions."""
    if "$ref" in member:
        return _kinds(definitions[member["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in member:
        return frozenset(map(str, (_kinds(item, definitions) for item in member["anyOf"])))
    kind = [member.get("type"), member.get("format"), member.get("enum")]
    if "items" in member:
        kind.append(_kinds(member["items"], definitions))
    if isinstance(inner := member.get("additionalProperties"), dict):
        kind.append(_kinds(inner, definitions))
    return kind
