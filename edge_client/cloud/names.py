"""Names and addresses of servers."""

import ipaddress
import socket


def join_target(address: str, port: int) -> str:
    """Returns "address:port", an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def find_addresses(host: str, port: int) -> tuple[str, ...]:
    """Returns the addresses of a host, as the system resolves it: each once, in its order.

    Those of the first one's family only: a host with IPv4 and IPv6 is one host, and the system puts first what this
    machine has a way to.

    Raises:
        OSError: If it has none, or cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for family, *_, address in found if family == found[0][0]))


def is_address(host: str) -> bool:
    """Returns whether a host is an address, and no name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
