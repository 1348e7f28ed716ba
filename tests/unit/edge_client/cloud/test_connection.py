"""Connections that are lent, replaced and closed."""

from unittest.mock import Mock

from edge_client.cloud.connection import Connections


def test_a_replaced_connection_lives_until_it_is_put_back() -> None:
    """A cancel on its way over it arrives, though the server fell silent for others meanwhile."""
    channels = [Mock(), Mock()]
    connections = Connections(iter(channels).__next__)
    lent = connections.take()
    connections.replace()
    with connections.use() as current:
        assert current is not lent
    assert not channels[0].close.called

    connections.put_back(lent)
    with connections.use():
        pass
    assert channels[0].close.called
    assert not channels[1].close.called
