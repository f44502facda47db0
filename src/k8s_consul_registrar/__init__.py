"""Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("k8s-consul-registrar")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
