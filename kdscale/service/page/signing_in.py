"""Signing in with a token or with a provider of identities, and out."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.datastructures import FormData
from starlette.responses import RedirectResponse, Response

from kdscale.service.access import oidc_sign_in
from kdscale.service.access.identity import Actor, address_of, failed_sign_ins, require
from kdscale.service.access.sessions import check_same_origin, delete_cookie, own_path, sessions_of, set_cookie
from kdscale.service.page.rendering import SIGN_IN, PageRoute, render, told
from kdscale.service.problems import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)
_START = "/runs"


async def sent_form(request: Request) -> FormData:
    """The fields of a form."""
    return await request.form()


Form = Annotated[FormData, Depends(sent_form)]


def text_of(form: FormData, name: str, limit: int = 200_000) -> str:
    """A field's text with line ends as on this system; empty for one that was not sent, or is a file."""
    value = form.get(name, "")
    text = value.replace("\r\n", "\n") if isinstance(value, str) else ""
    if len(text) > limit:
        raise Problem(422, "request", f"{name} is too long", expected=f"at most {limit:,} characters")
    return text


@router.get(SIGN_IN)
def sign_in_page(request: Request, next: str = "") -> Response:
    """Where a token is given."""
    return _page(request, next)


@router.post(SIGN_IN)
def sign_in(request: Request, form: Form) -> Response:
    """Take a token for a cookie."""
    check_same_origin(request)
    there = own_path(text_of(form, "next"), _START)
    if wait := failed_sign_ins(request).wait(address_of(request)):
        problem = Problem(429, "limit", "too many tokens that open nothing", hint=f"try again in {wait} seconds")
        return _page(request, there, problem, {"Retry-After": str(wait)})
    token = request.app.state.accounts.by_secret(text_of(form, "token").strip())
    if token is None:
        failed_sign_ins(request).take(address_of(request))
        return _page(
            request,
            there,
            Problem(
                401, "sign-in", "this token opens nothing: it is not one of this service, was revoked, or has ended"
            ),
        )
    request.state.actor = Actor(token.owner, token.scopes, token.id, "cookie", address_of(request))
    answer = RedirectResponse(there, 303)
    set_cookie(answer, request, sessions_of(request).signed(token.id))
    return answer


@router.get(oidc_sign_in.PATH)
def to_provider(request: Request, next: str = "") -> Response:
    """Send the browser to the provider of identities."""
    try:
        return oidc_sign_in.begin(request, own_path(next, _START))
    except Problem as problem:
        return _page(request, next, problem)


@router.get(oidc_sign_in.CALLBACK)
def from_provider(request: Request) -> Response:
    """Let whoever the provider sends back in, or say why not."""
    try:
        return oidc_sign_in.finish(request)
    except Problem as problem:
        return _page(request, _START, problem)


@router.post("/sign-out")
def sign_out(request: Request, actor: Annotated[Actor, Depends(require("read"))]) -> Response:
    """Have the browser forget who it was."""
    oidc_sign_in.sign_out(request.app.state.accounts, actor)
    answer = RedirectResponse(SIGN_IN, 303)
    delete_cookie(answer, request)
    return answer


def _page(request: Request, there: str, problem: Problem | None = None, headers: dict[str, Any] | None = None) -> Any:
    oidc = request.app.state.settings.oidc
    answer = render(
        request, "sign_in.html.j2", "Sign in", status=problem.status if problem else 200, next=own_path(there, _START),
        problem=told(problem) if problem else None, oidc=oidc.issuer if oidc else "",
    )  # fmt: skip
    answer.headers.update(headers or {})
    return answer
