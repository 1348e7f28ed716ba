"""The name of a caller's certificate; over a real connection: test_tls.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from cloud_server.rpc.peer import peer_name


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"x509_common_name": [b"alice"], "x509_subject_alternative_name": [b"other"]}, "alice"),
        ({"x509_common_name": [b""], "x509_subject_alternative_name": [b"dev-7", b"dev-8"]}, "dev-7"),
        ({"transport_security_type": [b"ssl"]}, None),
        ({}, None),
    ],
)
def test_the_name_of_a_certificate(facts: dict[str, Any], name: str | None) -> None:
    assert peer_name(SimpleNamespace(auth_context=lambda: facts)) == name  # type: ignore[arg-type]
