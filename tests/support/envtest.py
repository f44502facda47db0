"""A real etcd and kube-apiserver for tests, started as controller-runtime's envtest starts them.

One pair a test process, since a start takes seconds; it ends with the process.
"""

import atexit
import functools
import signal
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from k8s_consul_registrar.sandbox.certificates import Authority
from support.ports import reserve_ports
from support.real_process import LOOPBACK, Program, StartFailedError

START_WITHIN = 120.0  # seconds for both servers together
USERS = 200  # a token file is read once, so every user a test may want is in it from the start


class RealApiServer:
    """An etcd and a kube-apiserver on loopback with RBAC; users come from a token file.

    `admin_token` may do everything; `spare_users` (token by name) may do nothing until something is granted.
    """

    def __init__(self, assets: Path) -> None:
        self.authority = Authority()
        self.admin_token = "admin-token-of-this-test-run"
        self.spare_users = {f"user-{number}": f"token-of-user-{number}-in-tests" for number in range(USERS)}
        etcd, peer, self.port = reserve_ports(3)
        self._folder = tempfile.TemporaryDirectory(prefix="envtest-", ignore_cleanup_errors=True)
        home = Path(self._folder.name)
        etcd_url = f"http://{LOOPBACK}:{etcd}"
        self._etcd = Program(
            [
                str(assets / "etcd"), f"--data-dir={home / 'etcd'}", f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls=http://{LOOPBACK}:{peer}",
            ],
            home / "etcd.log",
        )  # fmt: skip
        self._write_secrets(home)
        self._api_server = Program(
            [
                str(assets / "kube-apiserver"), f"--etcd-servers={etcd_url}", f"--cert-dir={home}",
                f"--bind-address={LOOPBACK}", f"--secure-port={self.port}", f"--advertise-address={LOOPBACK}",
                "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
                f"--tls-cert-file={home / 'tls.crt'}", f"--tls-private-key-file={home / 'tls.key'}",
                f"--service-account-issuer=https://{LOOPBACK}:{self.port}/",
                f"--service-account-key-file={home / 'sa.key'}",
                f"--service-account-signing-key-file={home / 'sa.key'}",
                "--authorization-mode=RBAC", f"--token-auth-file={home / 'tokens.csv'}",
                "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
            ],
            home / "kube-apiserver.log",
        )  # fmt: skip

    def _write_secrets(self, home: Path) -> None:
        """Write the serving certificate, the key that signs service-account tokens, and the users."""
        leaf = self.authority._ca.issue_cert(LOOPBACK, "localhost")
        (home / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        (home / "tls.key").write_bytes(leaf.private_key_pem.bytes())
        (home / "sa.key").write_bytes(
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        users = [f'{self.admin_token},admin,admin,"system:masters"']
        users += [f"{token},{name},{name}" for name, token in self.spare_users.items()]
        (home / "tokens.csv").write_text("\n".join(users) + "\n")

    def start(self) -> None:
        """Start both and wait for the namespace the server creates last of what tests need."""
        self._etcd.launch()
        self._api_server.launch()
        until = time.monotonic() + START_WITHIN
        while not self._has("/api/v1/namespaces/kube-system"):
            if time.monotonic() > until or not self._api_server.is_running:
                raise StartFailedError(f"no API server: {self._api_server.tail()}\n{self._etcd.tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End both at once."""
        self._api_server.send(signal.SIGKILL)
        self._etcd.send(signal.SIGKILL)
        self._folder.cleanup()

    def _has(self, path: str) -> bool:
        request = urllib.request.Request(
            f"https://{LOOPBACK}:{self.port}{path}", headers={"Authorization": f"Bearer {self.admin_token}"}
        )
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        try:
            with urllib.request.urlopen(request, timeout=5, context=context):
                return True
        except (urllib.error.URLError, OSError):
            return False


@functools.cache
def shared_api_server(assets: Path) -> RealApiServer:
    """Return this process's API server, started when first asked for."""
    server = RealApiServer(assets)
    atexit.register(server.stop)
    server.start()
    return server
