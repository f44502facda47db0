"""Health, metrics, status page and service discovery over HTTP."""
