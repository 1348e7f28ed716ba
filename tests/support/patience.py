"""How long a test waits for what must happen."""

HANG_S = 600.0
"""For hangs alone: nothing waits for it to pass, and a loaded machine is ten times slower than an idle one.

Below pytest's own limit, so that a hang is explained by the test that sees it.
"""
