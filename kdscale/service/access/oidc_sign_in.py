"""The two requests of a sign-in with a provider: there, and back. The page has their routes."""

from __future__ import annotations

import html
import threading
import time

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from kdscale.service.access.identity import Actor, address_of
from kdscale.service.access.oidc import PENDING_SECONDS, TOKEN_SECONDS, Pending, Provider
from kdscale.service.access.sessions import own_path, sessions_of, set_cookie
from kdscale.service.database.accounts import Accounts
from kdscale.service.problems import Problem

PATH = "/sign-in/oidc"
CALLBACK = f"{PATH}/callback"
_COOKIE, _PURPOSE, _TOKEN_NAME = "kdscale-oidc", "oidc", "sign-in at"
_making = threading.Lock()


def begin(request: Request, there: str) -> Response:
    """Send the browser to the provider; `there`: the path of ours to go on with. Raises Problem."""
    url, pending = _provider(request).begin(_callback(request), there)
    answer = RedirectResponse(url, 303)
    # lax: the provider's page sends the browser back, which is a link from another site
    answer.set_cookie(
        _COOKIE, sessions_of(request).sealed(_PURPOSE, pending.as_list()), max_age=PENDING_SECONDS, path=PATH,
        secure=request.url.scheme == "https", httponly=True, samesite="lax",
    )  # fmt: skip
    return answer


def finish(request: Request) -> Response:
    """Let whoever comes back from the provider in, with a token of their own. Raises Problem."""
    sealed = request.cookies.get(_COOKIE, "")
    content = sessions_of(request).opened(_PURPOSE, sealed, PENDING_SECONDS)
    pending = Pending(*content) if content is not None and len(content) == len(Pending.__match_args__) else None
    identity = _provider(request).finish(request.query_params, _callback(request), pending)
    accounts: Accounts = request.app.state.accounts
    issuer = request.app.state.settings.oidc.issuer
    ends = time.time() + TOKEN_SECONDS
    token, _ = accounts.new_token(f"{_TOKEN_NAME} {issuer}"[:200], identity.owner, (identity.scope,), ends)
    request.state.actor = Actor(token.owner, token.scopes, token.id, "cookie", address_of(request))
    accounts.audit(
        token.owner, "sign-in", detail={"token_id": token.id, "provider": issuer}, address=address_of(request)
    )
    # After a redirect the next request would count as the provider's, with which browsers send no strict cookie.
    there = html.escape(own_path(pending.there if pending else "/"))  # signed, and yet never another site's
    answer = HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Signed in</title>'
        f'<meta http-equiv="refresh" content="0; url={there}"></head>'
        f'<body><p><a href="{there}">Go on</a></p></body></html>'
    )
    set_cookie(answer, request, sessions_of(request).signed(token.id), TOKEN_SECONDS)
    answer.delete_cookie(_COOKIE, path=PATH, secure=request.url.scheme == "https", httponly=True, samesite="lax")
    return answer


def sign_out(accounts: Accounts, actor: Actor) -> None:
    """End the token of a sign-in with the provider, which was made for it alone; a token of its own goes on."""
    token = accounts.by_id(actor.token_id)
    if token is not None and token.name.startswith(_TOKEN_NAME):
        accounts.revoke(token.id)


def _callback(request: Request) -> str:
    return str(request.url.replace(path=CALLBACK, query="", fragment=""))


def _provider(request: Request) -> Provider:
    """The provider of the request's service. Raises Problem (404) where there is none."""
    state = request.app.state
    if state.settings.oidc is None:
        raise Problem(404, "not-found", "this service knows no provider to sign in with")
    with _making:
        if getattr(state, "oidc_provider", None) is None:
            state.oidc_provider = Provider(state.settings.oidc)
    found: Provider = state.oidc_provider
    return found
