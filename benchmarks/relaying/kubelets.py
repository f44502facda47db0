"""The kubelets of the benchmark: one nginx that answers with TLS on as many loopback addresses as asked for."""

import gzip
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trustme

from relaying.machine import Cores, Process, free_port, program

TOKEN = "the-proxys-own-token-of-some-length-" + "x" * 900  # about as long as a service account's
DOMAIN = "kubelets.example"  # the certificate names every Node in it


@dataclass(frozen=True, slots=True)
class Body:
    """The answer of one kubelet; `as_go_does` is in chunks of 2 KB and TLS records of 4 KB, without a length."""

    name: str
    address: str
    payload: bytes
    is_gzip: bool = False
    as_go_does: bool = False

    @property
    def node(self) -> str:
        """The Node it belongs to, a name the certificate holds."""
        return node_name(self.address)


def node_name(address: str) -> str:
    """Return the name of the Node at an address."""
    return f"{address.replace('.', '-')}.{DOMAIN}"


def metrics_text(size: int) -> bytes:
    """Return about `size` bytes as cAdvisor writes them; always the same ones."""
    pick = random.Random(size)
    lines: list[str] = []
    length = 0
    while length < size:
        pod = f"{pick.choice(('api', 'web', 'batch', 'cache'))}-{pick.randrange(16**9):09x}-{pick.randrange(10**5):05d}"
        line = (
            f'container_cpu_usage_seconds_total{{container="app",cpu="total",id="/kubepods.slice/pod'
            f'{pick.randrange(16**12):012x}",image="registry.example/app:1.{pick.randrange(99)}",name="'
            f'{pick.randrange(16**16):016x}",namespace="team-{pick.randrange(30)}",pod="{pod}"}} '
            f"{pick.random() * 1e5:.6f} 17953{pick.randrange(10**8):08d}\n"
        )
        lines.append(line)
        length += len(line)
    return "".join(lines).encode()[:size]


def bodies() -> tuple[Body, ...]:
    """Return the bodies to measure: 2 KB, 100 KB gzip, the same as Go sends it, 1 MB plain."""
    text = metrics_text(1 << 20)
    size = 1 << 18
    while len(packed := gzip.compress(text[:size], 5, mtime=0)) < 100 * 1024:
        size += 1 << 14
    return (
        Body("2 KB", "127.0.1.1", text[:2048]),
        Body("100 KB gzip", "127.0.1.2", packed, is_gzip=True),
        Body("1 MB", "127.0.1.3", text),
        Body("100 KB gzip, as Go sends it", "127.0.1.4", packed, is_gzip=True, as_go_does=True),
    )


class Kubelets:
    """The running kubelets: `port` speaks TLS, `plain_port` does without, to measure what the load itself takes.

    Every loopback address that is no body's own answers with 100 KB gzip.
    """

    def __init__(self, folder: Path, cores: Cores) -> None:
        self.bodies = bodies()
        self.port, self.plain_port = free_port(), free_port()
        self.ca_file = folder / "kubelets-ca.pem"
        self._folder = folder / "kubelets"
        self._folder.mkdir()
        self.certificate = self._folder / "kubelet.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        leaf = authority.issue_cert(*(body.address for body in self.bodies), f"*.{DOMAIN}")
        leaf.private_key_and_cert_chain_pem.write_to_path(self.certificate)
        configuration = self._folder / "nginx.conf"
        configuration.write_text(self._configuration())
        argv = [program("nginx", "nginx-light"), "-p", str(self._folder), "-c", str(configuration)]
        self._process = Process(argv, cores=cores.others, log=self._folder / "log")

    async def __aenter__(self) -> Self:
        await self._process.__aenter__()
        try:
            await self._process.until_listening(self.port)
        except BaseException:
            await self._process.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._process.__aexit__()

    def _configuration(self) -> str:
        servers = "".join(self._server(body, body.address) for body in self.bodies)
        (gzip_body,) = (body for body in self.bodies if body.is_gzip and not body.as_go_does)
        # Started by root nginx would give its worker to a user who cannot read the temporary folder.
        user = "user root;" if os.geteuid() == 0 else ""
        return f"""
{user} daemon off; worker_processes 1; pid {self._folder}/pid; error_log stderr crit; worker_rlimit_nofile 40000;
events {{ worker_connections 20000; }}
http {{
  access_log off; server_tokens off; sendfile on; tcp_nopush on; open_file_cache max=100;
  keepalive_timeout 90s; keepalive_requests 1000000000; ssl_buffer_size 16k; client_header_buffer_size 4k;
  client_body_temp_path {self._folder}/body; proxy_temp_path {self._folder}/proxy;
  fastcgi_temp_path {self._folder}/fcgi; uwsgi_temp_path {self._folder}/uwsgi; scgi_temp_path {self._folder}/scgi;
  ssl_certificate {self._folder}/kubelet.pem; ssl_certificate_key {self._folder}/kubelet.pem;
{servers}{self._server(gzip_body, "0.0.0.0")}}}
"""

    def _server(self, body: Body, address: str) -> str:
        # nginx opens one socket for all addresses unless another than the wildcard has options of its own.
        more = " backlog=4096" if address == "0.0.0.0" else ""
        root = self._folder / address
        (root / "metrics").mkdir(parents=True)
        (root / "metrics" / "cadvisor").write_bytes(body.payload)
        encoding = "add_header Content-Encoding gzip;" if body.is_gzip else ""
        # The inclusion filter takes the length away and passes on what it read piece by piece.
        shape = "ssi on; ssi_types *; output_buffers 1 2k; ssl_buffer_size 4k;" if body.as_go_does else ""
        return f"""
  server {{
    listen {address}:{self.port} ssl{more}; listen {address}:{self.plain_port}{more};
    root {root}; default_type "text/plain; version=0.0.4; charset=utf-8"; etag off;
    if ($http_authorization != "Bearer {TOKEN}") {{ return 401; }}
    {encoding} {shape}
  }}
"""
