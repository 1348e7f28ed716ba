"""The gateway: three HTTP APIs and a page over one job queue."""
