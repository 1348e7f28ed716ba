"""The gateway: this device's pipeline for web clients, by three faces of one job queue. No torch."""
