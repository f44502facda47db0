"""Who the proxy is to kubelets, and whom it believes to be a kubelet or a Pod, followed as it changes."""

import asyncio
import ssl
from pathlib import Path
from typing import NamedTuple

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.files import Followed
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.credentials import Identity
from k8s_consul_registrar.kube.tls import KeyPair, certificates, show
from k8s_consul_registrar.proxy.frames import Trust
from k8s_consul_registrar.proxy.tls import kubelet_context, pod_context
from k8s_consul_registrar.settings.proxying import KubeletSettings, ProxiedPods
from k8s_consul_registrar.telemetry import get_logger

# The file behind a token is read again once a minute at the most; asking this often costs nothing.
PERIOD = 10.0

log = get_logger("trust")


class Made(NamedTuple):
    """A context, and what it is made of, for a process that must make the same without the files."""

    context: ssl.SSLContext
    trust: Trust


class KubeletIdentity:
    """The token or certificate that kubelets know us by, for code that must not wait.

    A certificate of our own (KUBELET_CLIENT_CERT_FILE) stands in place of the token; without both, the
    kubeconfig's certificate does.
    """

    def __init__(self, settings: KubeletSettings, access: Access) -> None:
        """Read the files; raises AccessError, naming the setting, where one cannot be used."""
        self._settings = settings
        self._access = access
        self._token = ""
        self._pair: KeyPair | None = None
        self._problem = ""
        self._cluster_ca = access.cluster_ca
        names = (settings.ca_file, settings.client_cert_file, settings.client_key_file)
        paths = [Path(name) for name in names if name]
        self._made = Followed("certificates for kubelets", paths, self._make)

    def token(self) -> str:
        """Return the token, empty for none; raises AccessError where none could be had."""
        if self._problem:
            raise AccessError(self._problem)
        return self._token

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self._made.value.context

    @property
    def trust(self) -> Trust:
        """What that context is made of, our key included."""
        return self._made.value.trust

    @property
    def problem(self) -> str:
        """Why there is no token to be had, empty where there is or none is needed."""
        return self._problem

    async def refresh(self) -> None:
        """Ask for what is current; a token that was had stays while the next cannot be."""
        if self._settings.client_cert_file:
            self._look()
            return
        try:
            identity = await self._access.credentials.identity()
        except AccessError as error:
            if not self._token and self._pair is None:
                self._problem = str(error)
            log.warning("no fresh credentials for the kubelets", problem=str(error))
            self._look()
        else:
            self._take(identity)

    def _take(self, identity: Identity) -> None:
        self._problem, self._token = "", identity.token
        pair = None if identity.token else identity.pair
        is_another = pair != self._pair
        self._pair = pair
        self._look(is_due=is_another)

    def _look(self, *, is_due: bool = False) -> None:
        """Make the context again where our files changed, or what the access to the API server gives for it."""
        has_cluster_ca = not self._settings.ca_file
        cluster_ca = self._access.cluster_ca
        self._made.look(is_due=is_due or (has_cluster_ca and cluster_ca != self._cluster_ca))
        self._cluster_ca = cluster_ca

    async def keep_fresh(self) -> None:
        """Follow every change for ever; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.refresh()

    def _make(self) -> Made:
        settings = self._settings
        pair = self._pair
        ca_pem = _read_ca(settings.ca_file, "KUBELET_CA_FILE") or self._access.cluster_ca
        try:
            context = kubelet_context(ca_pem=ca_pem, skip_verification=settings.skip_verify)
        except (OSError, ValueError) as error:
            where = settings.ca_file or "the cluster's own"
            raise AccessError(f"KUBELET_CA_FILE ({where}) holds no usable certificate: {error}") from None
        if settings.client_cert_file:
            pair = _show_files(context, settings.client_cert_file, settings.client_key_file)
        elif pair is not None:
            show(context, pair)
        certificate, key = (b"", b"") if pair is None else (pair.certificate, pair.key)
        return Made(context, Trust(ca_pem, settings.skip_verify, certificate, key))


class PodTrust:
    """Whom we believe to be a Pod that is scraped by https."""

    def __init__(self, pods: ProxiedPods) -> None:
        """Read the file; raises AccessError where it cannot be used."""
        self._pods = pods
        paths = [Path(pods.ca_file)] if pods.ca_file else []
        self._made = Followed("certificates of Pods", paths, self._make)

    def context(self) -> ssl.SSLContext:
        """Return the context for Pods."""
        return self._made.value.context

    @property
    def trust(self) -> Trust:
        """What that context is made of."""
        return self._made.value.trust

    async def keep_fresh(self) -> None:
        """Follow every change for ever; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            self._made.look()

    def _make(self) -> Made:
        ca_pem = _read_ca(self._pods.ca_file, "POD_CA_FILE")
        skips = self._pods.skip_verify
        try:
            return Made(pod_context(ca_pem=ca_pem, skip_verification=skips), Trust(ca_pem, skips))
        except (OSError, ValueError) as error:
            raise AccessError(
                f"POD_CA_FILE {self._pods.ca_file} holds no usable certificate: {error}"
            ) from None


def _read_ca(name: str, setting: str) -> str | None:
    """Return the certificates of a file, None where none is set; raises AccessError."""
    if not name:
        return None
    try:
        text = Path(name).read_bytes()
    except OSError as error:
        raise AccessError(f"{setting} {name} cannot be read: {error.strerror}") from None
    return certificates(text, f"{setting} {name}")


def _show_files(context: ssl.SSLContext, certificate: str, key: str) -> KeyPair:
    """Have a context show a certificate out of files, and return it."""
    try:
        # The password keeps OpenSSL from asking on the terminal for an encrypted key's.
        context.load_cert_chain(certificate, key, password="")
        return KeyPair(Path(certificate).read_bytes(), Path(key).read_bytes())
    except (OSError, ValueError) as error:
        what = (isinstance(error, ssl.SSLError) and error.reason) or (
            isinstance(error, OSError) and error.strerror
        )
        raise AccessError(
            f"KUBELET_CLIENT_CERT_FILE {certificate} with KUBELET_CLIENT_KEY_FILE {key} cannot be used: "
            f"{str(what or error).lower().replace('_', ' ')}"
        ) from None
