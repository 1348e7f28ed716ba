"""Who is at the other end of a connection, as its certificate says."""

from typing import Any

import grpc


def peer_name(context: "grpc.aio.ServicerContext[Any, Any]") -> str | None:
    """Returns the name of the caller's certificate, which the server has verified; None where it asks for none.

    The common name; without one, the first name that the certificate is for.
    """
    facts = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        name = next(iter(facts.get(key, ())), b"").decode("utf-8", "replace")
        if name:
            return name
    return None
