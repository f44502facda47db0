"""The start of the command."""

import subprocess
import sys

SCRIPT = """
import ssl, sys
from k8s_consul_registrar.__main__ import run
sys.argv = ["k8s-consul-registrar", "plan", "--kubeconfig", "/missing"]
before = ssl.create_default_context
assert run() == 2
assert "aiohttp" in sys.modules
from aiohttp import connector
assert connector._SSL_CONTEXT_VERIFIED.get_ca_certs() == []
assert connector._SSL_CONTEXT_VERIFIED.verify_mode is ssl.CERT_REQUIRED
assert ssl.create_default_context is before
"""


def test_command_loads_without_the_systems_authorities() -> None:
    """No authorities are read as aiohttp loads; a context that is made later has them again."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
