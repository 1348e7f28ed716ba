"""What tokens have used of their limits at the gateway, on a clock of our own."""

import pytest

from edge_client.web.auth import Caller
from edge_client.web.jobs.quotas import Quotas, Work
from hybridsd.errors import CloudBusy
from hybridsd.tokens import Quota


def test_another_limit_forgives_nothing() -> None:
    """A token that used up its minute has no new one when the operator changes its limit."""
    counted = Quotas(lambda: 0.0)
    counted.take(Caller(owner="alice", host="", quota=Quota(steps_per_minute=60)), Work(steps=60))
    with pytest.raises(CloudBusy):
        counted.take(Caller(owner="alice", host="", quota=Quota(steps_per_minute=61)), Work(steps=2))
