"""Certificates of the sandbox, by one throwaway authority for the API server, kubelets and clients."""

import ssl
from enum import StrEnum
from typing import NamedTuple

import trustme


class KubeletCertificate(StrEnum):
    """Kinds of a kubelet's serving certificate."""

    ADDRESS = "address"  # signed by the cluster's authority, for the node's address and name
    NAME_ONLY = "name-only"  # signed by it, for the node's name only
    SELF_SIGNED = "self-signed"  # made by the kubelet itself, the default


class ClientCertificate(NamedTuple):
    """A client's certificate chain and private key, PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """The cluster's certificate authority."""

    def __init__(self) -> None:
        self._ca = trustme.CA(organization_name="sandbox", key_type=trustme.KeyType.ECDSA)

    @property
    def pem(self) -> bytes:
        """The authority's certificate, which verifies the others."""
        return self._ca.cert_pem.bytes()

    def api_server(self, *names: str) -> ssl.SSLContext:
        """Return the API server's TLS context, which accepts client certificates of this authority."""
        context = _server_context()
        self._ca.issue_cert(*names, key_type=trustme.KeyType.ECDSA).configure_cert(context)
        self._ca.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def kubelet(self, name: str, address: str, kind: KubeletCertificate) -> ssl.SSLContext:
        """Return the TLS context of one kubelet."""
        authority = trustme.CA() if kind is KubeletCertificate.SELF_SIGNED else self._ca
        names = (name,) if kind is not KubeletCertificate.ADDRESS else (address, name)
        context = _server_context()
        authority.issue_cert(*names, key_type=trustme.KeyType.ECDSA).configure_cert(context)
        return context

    def client(self, user: str) -> ClientCertificate:
        """Return a user's certificate."""
        leaf = self._ca.issue_cert(common_name=user, key_type=trustme.KeyType.ECDSA)
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        return ClientCertificate(chain, leaf.private_key_pem.bytes())


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    return context
