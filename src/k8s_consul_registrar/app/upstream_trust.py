"""The proxy's credentials for kubelets, and its trust in kubelets and Pods, renewed as files change."""

import asyncio
import ssl
from pathlib import Path
from typing import NamedTuple

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.credentials import Identity
from k8s_consul_registrar.proxy.frames import Trust
from k8s_consul_registrar.proxy.tls import kubelet_context, pod_context
from k8s_consul_registrar.rotating import Rotating, reason
from k8s_consul_registrar.settings.proxy import KubeletSettings, ProxiedPods
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import KeyPair, read_certificates, read_pair, show

# Seconds between two looks at files and credentials.
PERIOD = 10.0

log = get_logger("trust")


class Made(NamedTuple):
    """A context, and its material for another process that must build the same without the files."""

    context: ssl.SSLContext
    trust: Trust


class KubeletIdentity:
    """The token or certificate that kubelets are shown, for code that must not wait.

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
        self._logged = ""  # the problem that the log shows last
        self._cluster_ca = access.cluster_ca
        names = (settings.ca_file, settings.client_cert_file, settings.client_key_file)
        paths = [Path(name) for name in names if name]
        self._made = Rotating("KUBELET_CA_FILE", paths, self._make)

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
            if str(error) != self._logged:
                self._logged = str(error)
                log.warning("no fresh credentials for the kubelets", problem=str(error))
            self._look()
        else:
            self._take(identity)

    def _take(self, identity: Identity) -> None:
        if self._logged:
            log.info("fresh credentials for the kubelets again")
        self._problem, self._logged, self._token = "", "", identity.token
        pair = None if identity.token else identity.pair
        is_another = pair != self._pair
        self._pair = pair
        self._look(is_due=is_another)

    def _look(self, *, is_due: bool = False) -> None:
        """Make the context again where our files changed, or what the access to the API server gives for it."""
        has_cluster_ca = not self._settings.ca_file
        cluster_ca = self._access.cluster_ca
        self._made.refresh(is_due=is_due or (has_cluster_ca and cluster_ca != self._cluster_ca))
        self._cluster_ca = cluster_ca

    async def keep_fresh(self) -> None:
        """Follow every change; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.refresh()

    def _make(self) -> Made:
        settings = self._settings
        pair = self._pair
        ca_pem = _read_ca(settings.ca_file, "KUBELET_CA_FILE") or self._access.cluster_ca
        try:
            context = kubelet_context(ca_pem=ca_pem, skip_verification=settings.skip_verify)
        except (OSError, ValueError, TypeError) as error:
            where = settings.ca_file or "the cluster's own"
            raise AccessError(
                f"KUBELET_CA_FILE ({where}) holds no usable certificate: {reason(error)}"
            ) from None
        if settings.client_cert_file:
            certificate_file, key_file = Path(settings.client_cert_file), Path(settings.client_key_file)
            pair = read_pair(
                certificate_file, key_file, "KUBELET_CLIENT_CERT_FILE", "KUBELET_CLIENT_KEY_FILE"
            )
        if pair is not None:
            show(context, pair)
        certificate, key = (b"", b"") if pair is None else (pair.certificate, pair.key)
        return Made(context, Trust(ca_pem, settings.skip_verify, certificate, key))


class PodTrust:
    """The trust in Pods that are scraped by https."""

    def __init__(self, pods: ProxiedPods) -> None:
        """Read the file; raises AccessError where it cannot be used."""
        self._pods = pods
        paths = [Path(pods.ca_file)] if pods.ca_file else []
        self._made = Rotating("POD_CA_FILE", paths, self._make)

    def context(self) -> ssl.SSLContext:
        """Return the context for Pods."""
        return self._made.value.context

    @property
    def trust(self) -> Trust:
        """What that context is made of."""
        return self._made.value.trust

    def refresh(self) -> None:
        """Read the file again if it changed."""
        self._made.refresh()

    async def keep_fresh(self) -> None:
        """Follow every change; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            self.refresh()

    def _make(self) -> Made:
        ca_pem = _read_ca(self._pods.ca_file, "POD_CA_FILE")
        skips = self._pods.skip_verify
        try:
            return Made(pod_context(ca_pem=ca_pem, skip_verification=skips), Trust(ca_pem, skips))
        except (OSError, ValueError, TypeError) as error:
            raise AccessError(
                f"POD_CA_FILE {self._pods.ca_file} holds no usable certificate: {reason(error)}"
            ) from None


def _read_ca(name: str, setting: str) -> str | None:
    """Return the certificates of a file, None if none is set; raises AccessError."""
    return read_certificates(Path(name), setting) if name else None
