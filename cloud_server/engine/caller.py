"""Who asks for a job: whose it is, whose share it takes, and what it may."""

from dataclasses import dataclass

from hybridsd.tokens import NO_QUOTA, Quota


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A caller, as far as the engine is concerned."""

    principal: str = ""
    """Who is known to ask: the name of a token, or of a certificate; without either, the machine."""
    user: str = ""
    """For whom of its own callers the principal asks, as it says; empty for itself."""
    owner: str = ""
    """Whose the job is: nobody else can attach to it or stop it. Empty: everybody's, as without tokens."""
    weight: float = 1.0
    """Of the principal's share, above 0."""
    has_priority: bool = False
    """Whether its jobs come before those of callers without."""
    is_admin: bool = False
    """Whether all jobs are its own."""
    quota: Quota = NO_QUOTA
    """Of the principal."""


NOBODY = Caller()
"""A caller of a server that asks nobody who they are."""
