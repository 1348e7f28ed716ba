"""Names and addresses of servers."""

import ipaddress
import socket


def join_target(address: str, port: int) -> str:
    """Returns "address:port", an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def find_addresses(host: str, port: int) -> tuple[str, ...]:
    """Returns the addresses of a host, as the system resolves it: each once, in its order.

    Raises:
        OSError: If it has none, or cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def is_address(host: str) -> bool:
    """Returns whether a host is an address, and no name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
