"""Who calls, and what they may: the token, the user that a gateway names, the certificate, else the machine.

All of it is in the head of a call: nothing that a caller without rights sent is received. Knows nothing of messages.
"""

import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.logs import note
from cloud_server.rpc.peer import peer_name
from cloud_server.rpc.status import rich_status
from hybridsd.errors import HybridSDError, Reason
from hybridsd.tokens import MAX_USER_CHARS, USER_KEY, Token, Tokens

_OURS = "/hybridsd."
_OPEN = "/grpc.health."
_SCOPES = {
    "Denoise": ("generate",),
    "CompilePlan": ("generate",),
    "DownloadFile": ("generate",),
    "CancelDenoise": ("generate", "admin"),
    "ListJobs": ("generate", "admin"),
    **dict.fromkeys(("ListModels", "LoadModel", "UnloadModel", "LoadLora", "UnloadLora"), ("admin",)),
}
"""Of which a token must have one, by method; any token may call the others."""
_USER = re.compile(r"[ -~]+")
_caller: ContextVar[Caller] = ContextVar("cloud_server_caller", default=NOBODY)


def current_caller() -> Caller:
    """Returns who made the call that this task serves."""
    return _caller.get()


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Finds out who calls; with tokens, demands `authorization: Bearer TOKEN` of every call but health checks."""

    def __init__(self, tokens: Tokens | None) -> None:
        """Takes the tokens; None: everybody may call."""
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN):
            return handler
        head, method = list(details.invocation_metadata or ()), details.method
        token: Token | None = None
        try:
            if self._tokens is not None:
                token = _find(self._tokens, head)
                _check(token, method.rpartition("/")[2])
            user = _user(head)
        except HybridSDError as error:
            return _refusing(error, token, is_ours=method.startswith(_OURS))
        return _with_caller(handler, token, user) if method.startswith(_OURS) else handler


def caller_of(context: "grpc.aio.ServicerContext[Any, Any]", token: Token | None, user: str) -> Caller:
    """Returns who calls.

    Args:
        context: Of the call.
        token: What it was made with; None on a server without tokens.
        user: For whom a gateway asks; empty for itself.
    """
    if token is None:
        name = peer_name(context)
        machine = context.peer().rpartition(":")[0]
        return Caller(principal=name or machine, user=user, owner=_owner(f"certificate {name}", user) if name else "")
    return Caller(
        principal=token.name,
        user=user,
        owner=_owner(f"token {token.owner}", user),
        weight=token.weight,
        has_priority="priority" in token.scopes,
        is_admin="admin" in token.scopes,
        quota=token.quota,
    )


def _owner(name: str, user: str) -> str:
    return f"{name}\n{user}"  # a user's name has no line end


def _find(tokens: Tokens, head: list[Any]) -> Token:
    given = [str(value) for key, value in head if key == "authorization"]
    scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    token = tokens.find(secret) if scheme == "Bearer" and secret else None
    if token is None:
        what = "wrong" if given else "missing"
        raise Reason.UNAUTHENTICATED.error(f"the token is {what}; send 'authorization: Bearer TOKEN'")
    return token


def _check(token: Token, method: str) -> None:
    """Refuses a token that has expired, or may not call a method."""
    if token.expires is not None and token.has_expired():
        raise Reason.UNAUTHENTICATED.error(
            f"the token {token.name} expired at {token.expires:%Y-%m-%d %H:%M} UTC; ask the operator of the server for"
            " a new one"
        )
    needed = _SCOPES.get(method, ())
    if needed and not token.scopes.intersection(needed):
        raise Reason.PERMISSION_DENIED.error(
            f"the token {token.name} has not the scope {' or '.join(needed)}, which {method} needs; ask the operator of"
            " the server for a token that has it"
        )


def _user(head: list[Any]) -> str:
    given = [value if isinstance(value, str) else "\n" for key, value in head if key == USER_KEY]
    if not given:
        return ""
    if len(given) > 1 or len(given[0]) > MAX_USER_CHARS or not _USER.fullmatch(given[0]):
        raise Reason.FIELD_INVALID.error(
            f"{USER_KEY} is given {len(given)} times, with {len(given[0])} characters; give it once, with 1 to"
            f" {MAX_USER_CHARS} of printable ASCII, or leave it out",
            field=USER_KEY,
        )
    return given[0]


def _refusing(error: HybridSDError, token: Token | None, *, is_ours: bool) -> Any:
    """Returns a handler that refuses any call."""

    async def refuse(_messages: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        if not is_ours:
            await context.abort_with_status(rich_status(error))
        note(token=None if token is None else token.name)
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)  # of any method: a stream that is not read is not received


def _with_caller(handler: Any, token: Token | None, user: str) -> Any:
    """Returns a handler of our services whose calls know who made them."""
    inner = handler.unary_stream or handler.unary_unary

    async def run(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        _caller.set(caller_of(context, token, user))
        note(token=None if token is None else token.name, user=user or None)
        return await inner(request, context)

    make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
    return make(run, handler.request_deserializer, handler.response_serializer)
