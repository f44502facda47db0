"""Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics."""

# The one place it is written: looking it up in the installed package's metadata took a tenth of the start.
__version__ = "1.0.0"
