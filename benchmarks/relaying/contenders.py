"""The relays that are compared: ours as users run it, nginx configured for the same, a plain aiohttp one, a Go one.

Each runs on the one core that is the proxy's and relays to the same kubelets, with their certificates
verified, their connections kept, the token added and the same fields passed on.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import trustme

from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from k8s_consul_registrar.sandbox.synthetic import synthetic_nodes
from relaying.kubelets import DOMAIN, TOKEN, Kubelets, node_name
from relaying.machine import LOOPBACK, Cores, Missing, Process, free_port, program

OURS, BASE, NGINX, TUNED, PLAIN = "ours", "base", "nginx", "nginx, larger buffers", "aiohttp"
GO = "Go"
GO_PLACES = "/usr/local/go/bin:/usr/lib/go/bin"
# What it takes to hold a whole TLS record; as many as a response needs to flow.
LARGER_BUFFERS = "proxy_buffer_size 16k; proxy_buffers 16 16k; proxy_busy_buffers_size 64k;"


class Contender:
    """One running relay."""

    def __init__(self, name: str, port: int, process: Process) -> None:
        self.name = name
        self.port = port
        self.process = process

    async def __aenter__(self) -> Self:
        await self.process.__aenter__()
        try:
            await self.process.until_listening(self.port)
        except BaseException:
            await self.process.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.process.__aexit__()


@dataclass(frozen=True, slots=True)
class Guard:
    """The token that a relay asks of clients, and the file of the certificate and key that it shows to them."""

    token: str
    token_file: Path
    certificate: Path

    @classmethod
    def make(cls, folder: Path) -> "Guard":
        """Write the files."""
        guard = cls("what-prometheus-shows", folder / "client-token", folder / "relay.pem")
        guard.token_file.write_text(guard.token)
        leaf = trustme.CA().issue_cert(LOOPBACK)
        leaf.private_key_and_cert_chain_pem.write_to_path(guard.certificate)
        return guard


def path_of(address: str, port: int) -> str:
    """Return the path a kubelet is registered with."""
    return f"/api/v1/nodes/{address}:{port}/metrics/cadvisor"


def benchmark_nodes(kubelets: Kubelets, distinct: int) -> list[dict[str, Any]]:
    """Return a Node a body, and `distinct` more of addresses of their own."""
    nodes = [
        objects.node(body.node, addresses=(("InternalIP", body.address),), kubelet_port=kubelets.port)
        for body in kubelets.bodies
    ]
    for node in synthetic_nodes(distinct):
        node["metadata"]["name"] += f".{DOMAIN}"
        node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = kubelets.port
        nodes.append(node)
    return nodes


def ours(
    kubelets: Kubelets,
    sandbox: Sandbox,
    folder: Path,
    cores: Cores,
    *,
    base: Path | None = None,
    guard: Guard | None = None,
) -> Contender:
    """Return the daemon of this checkout or of `base`; its cluster is the sandbox's, whose Nodes are the kubelets'."""
    port = free_port()
    kubeconfig = sandbox.write_kubeconfig(
        folder / f"kubeconfig-{port}", sandbox.access.grant("proxy", token=TOKEN)
    )
    environment = {
        "KUBECONFIG": str(kubeconfig),
        "PORT": str(port),
        "ADMIN_PORT": "0",
        "KUBELET_CA_FILE": str(kubelets.ca_file),
        "KUBELET_TLS_SERVER_NAME": "node",
        "PROXY_ALLOW_LOOPBACK": "true",
    }
    if guard is None:
        # All clients ask one kubelet; nginx has no such limit.
        environment["SCRAPE_CONCURRENCY_PER_NODE"] = "512"
    else:
        environment["PROXY_BEARER_TOKEN_FILE"] = str(guard.token_file)
        environment["TLS_CERT_FILE"] = environment["TLS_KEY_FILE"] = str(guard.certificate)
    if base is not None:
        environment["PYTHONPATH"] = str(base / "src")
    argv = [sys.executable, "-m", "k8s_consul_registrar", "proxy"]
    process = Process(argv, cores=cores.proxy, log=folder / f"ours-{port}.log", environment=environment)
    return Contender(OURS if base is None else BASE, port, process)


def nginx(
    kubelets: Kubelets,
    folder: Path,
    cores: Cores,
    *,
    buffers: str = "",
    guard: Guard | None = None,
    more: Sequence[tuple[str, int]] = (),
) -> Contender:
    """Return nginx with a location and kept connections a kubelet, `more` of them by address and port.

    Its buffers are of its own size unless given.
    """
    port = free_port()
    home = folder / f"nginx-{port}"
    home.mkdir()
    configuration = home / "nginx.conf"
    upstreams = [*((body.address, kubelets.port) for body in kubelets.bodies), *more]
    groups = "".join(
        f"  upstream k{number} {{ server {address}:{at}; keepalive 256; "
        "keepalive_requests 1000000000; keepalive_timeout 75s; }\n"
        for number, (address, at) in enumerate(upstreams)
    )
    locations = "".join(
        f"    location = {path_of(address, at)} {{ "
        f"proxy_pass https://k{number}/metrics/cadvisor; proxy_ssl_name {node_name(address)}; }}\n"
        for number, (address, at) in enumerate(upstreams)
    )
    guarded = (
        ""
        if guard is None
        else (
            f"ssl_certificate {guard.certificate}; ssl_certificate_key {guard.certificate};\n"
            f'    if ($http_authorization != "Bearer {guard.token}") {{ return 401; }}'
        )
    )
    configuration.write_text(f"""
daemon off; worker_processes 1; pid {home}/pid; error_log stderr crit; worker_rlimit_nofile 20000;
events {{ worker_connections 8000; }}
http {{
  access_log off; server_tokens off; etag off;
  keepalive_timeout 330s; keepalive_requests 1000000000;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
{groups}
  server {{
    listen {LOOPBACK}:{port} {"ssl" if guard else ""} backlog=1024;
    {guarded}
    proxy_http_version 1.1;
    proxy_set_header Connection ""; proxy_set_header Cookie ""; proxy_set_header User-Agent bench;
    proxy_set_header X-Prometheus-Scrape-Timeout-Seconds "";
    proxy_set_header Authorization "Bearer {TOKEN}";
    proxy_hide_header Accept-Ranges; proxy_hide_header Last-Modified;
    proxy_ssl_verify on; proxy_ssl_trusted_certificate {kubelets.ca_file}; proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_read_timeout 30s; proxy_max_temp_file_size 0; {buffers}
{locations}  }}
}}
""")
    argv = [program("nginx", "nginx-light"), "-p", str(home), "-c", str(configuration)]
    name = TUNED if buffers else NGINX
    return Contender(name, port, Process(argv, cores=cores.proxy, log=home / "log"))


def plain(kubelets: Kubelets, folder: Path, cores: Cores) -> Contender:
    """Return the plain aiohttp relay."""
    port = free_port()
    script = Path(__file__).with_name("plain.py")
    argv = [sys.executable, str(script), str(port), str(kubelets.ca_file)]
    process = Process(argv, cores=cores.proxy, log=folder / "plain.log", environment={"TOKEN": TOKEN})
    return Contender(PLAIN, port, process)


def build_go(folder: Path) -> Path:
    """Build the Go reverse proxy, of Go's own library only, and return the program."""
    places = f"{os.environ.get('PATH', '')}:{GO_PLACES}"
    compiler = shutil.which("go", path=places)
    if compiler is None:
        raise Missing("go is not on this machine: apt-get install -y golang-go")
    built, source = folder / "reverse_proxy", Path(__file__).with_name("reverse_proxy.go")
    offline = {"GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    subprocess.run([compiler, "build", "-o", built, source], check=True, env={**os.environ, **offline})
    return built


def go(built: Path, kubelets: Kubelets, folder: Path, cores: Cores, guard: Guard) -> Contender:
    """Return the Go reverse proxy, on one core as the others."""
    port = free_port()
    argv = [str(built), str(port), *[str(guard.certificate)] * 2, str(kubelets.ca_file), DOMAIN]
    environment = {"TOKEN": TOKEN, "CLIENT_TOKEN": guard.token}
    return Contender(
        GO, port, Process(argv, cores=cores.proxy, log=folder / "go.log", environment=environment)
    )
