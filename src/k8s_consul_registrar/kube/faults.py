"""What a broken connection to the API server means: aiohttp's and the loop's exceptions to our errors."""

import ssl

import aiohttp

from k8s_consul_registrar.errors import ClusterError, ClusterRefused, ClusterUnreachable
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.status import Action, clipped

# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
NAME_MISMATCHES = (62, 64)
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
OUT_OF_DATE = (9, 10)

TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)


def transport_error(error: Exception, action: Action, access: Access) -> ClusterError:
    """Return the error for a request that brought no whole answer.

    The texts are built from the parts that hold no URL, since a proxy's may hold a password.
    """
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.ClientHttpProxyError):
        return ClusterRefused(
            f"cannot {action}: {access.server} does not speak HTTP: {clipped(error.message)}"
        )
    return ClusterUnreachable(f"cannot {action}: {_broken(error, access)}")


def _broken(error: Exception, access: Access) -> str:
    verification = _verification_error(error)
    if verification is not None:
        return _unverified(verification, access)
    match error:
        case aiohttp.ClientHttpProxyError():
            why = f"the proxy answered {error.status} to CONNECT"
        case aiohttp.ClientProxyConnectionError():
            why = f"no connection to the proxy: {clipped(str(error.os_error))}"
        case aiohttp.ClientConnectorError():
            why = f"no connection to {access.server}: {clipped(str(error.os_error))}"
        case aiohttp.ConnectionTimeoutError():
            why = f"no connection to {access.server}: timed out"
        case TimeoutError():
            why = f"{access.server} took too long to answer"
        case aiohttp.ClientPayloadError():
            why = f"{access.server} broke off its answer"
        case _:
            why = f"the connection to {access.server} broke: {clipped(str(error)) or type(error).__name__}"
    return why


def _verification_error(error: Exception) -> ssl.SSLCertVerificationError | None:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        inner: BaseException | None = error.certificate_error
    else:
        inner = error.__cause__ or error
    return inner if isinstance(inner, ssl.SSLCertVerificationError) else None


def _unverified(error: ssl.SSLCertVerificationError, access: Access) -> str:
    if error.verify_code in NAME_MISMATCHES:
        hint = "tls-server-name of the kubeconfig can give a name that the certificate has"
    elif error.verify_code in OUT_OF_DATE:
        hint = "it or its authority's is to be renewed, unless the clock here is wrong"
    else:
        ca = access.trust.ca_setting if access.trust and access.trust.ca else "the system's certificates"
        hint = f"certificate-authority must hold the CA that signed it (now: {ca})"
    return f"the certificate of {access.server} cannot be verified: {clipped(error.verify_message)}; {hint}"
