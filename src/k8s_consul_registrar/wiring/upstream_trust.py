"""The proxy's credentials for kubelets, renewed as files and the API server's access change."""

import asyncio
import ssl
from dataclasses import replace

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.credentials import ClientIdentity
from k8s_consul_registrar.settings.proxy import KubeletSettings
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import KUBELET, Trust, client_tls

# Seconds between two looks at files and credentials.
PERIOD = 10.0

log = get_logger("trust")


class KubeletIdentity:
    """The token or certificate that kubelets are shown, and their CAs, for code that must not wait.

    The certificate of KUBELET_CLIENT_CERT_FILE takes the place of the token; without both, the kubeconfig's
    certificate is shown. Without KUBELET_CA_FILE the cluster's CAs count.
    """

    def __init__(self, settings: KubeletSettings, access: Access) -> None:
        """Read the files; raises AccessError, naming the setting, if one cannot be used."""
        self._settings = settings
        self._access = access
        self._files = client_tls(
            KUBELET,
            settings.ca_file,
            settings.client_cert_file,
            settings.client_key_file,
            is_verified=not settings.skip_verify,
        )
        self._identity = ClientIdentity()
        self._problem = ""
        self._logged = ""  # the problem that was logged last
        self.trust = Trust()
        self._renew()

    @property
    def problem(self) -> str:
        """Why there is no token, empty if there is one or none is needed."""
        return self._problem

    def token(self) -> str:
        """Return the token, empty for none; raises AccessError while there was never an identity."""
        if self._problem:
            raise AccessError(self._problem)
        return self._identity.token

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self.trust.context

    async def refresh(self) -> None:
        """Load what changed; the last good token, certificate and CAs stay while others cannot be used."""
        if not self._settings.client_cert_file:
            await self._identify()
        self._files.refresh()
        self._renew()

    async def keep_fresh(self) -> None:
        """Follow every change; ends only by cancellation."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.refresh()

    async def _identify(self) -> None:
        try:
            self._identity = await self._access.credentials.identity()
        except AccessError as error:
            if self._identity == ClientIdentity():
                self._problem = str(error)
            if str(error) != self._logged:
                self._logged = str(error)
                log.warning("no fresh credentials for the kubelets", problem=str(error))
            return
        if self._logged:
            log.info("fresh credentials for the kubelets again")
        self._problem = self._logged = ""

    def _renew(self) -> None:
        """Keep the very same context while nothing of it changed: it is what connections are kept for."""
        trust, identity = self._files.value, self._identity
        cluster = None if self._settings.ca_file else self._access.trust
        if cluster is not None:
            trust = replace(trust, ca=cluster.ca, ca_setting=cluster.ca_setting)
        if trust.pair is None and not identity.token:
            trust = replace(trust, pair=identity.pair)
        if trust != self.trust:
            _ = trust.context  # not to be built while a scrape waits
            self.trust = trust
