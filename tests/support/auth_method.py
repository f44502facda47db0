"""An auth method of a real Consul, and the tokens that are shown to it."""

import base64
import json
import time

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from support.real_servers import RealConsul
from support.waiting import until


async def set_up_method(real: RealConsul, signer: "Signer") -> None:
    """Create the auth method, once the ACL system of the new server lets one, a role and a binding rule."""
    config = {
        "JWTValidationPubKeys": [signer.public],
        "BoundAudiences": ["consul"],
        "ClaimMappings": {"team": "team"},
    }
    method = {"Name": "jwt", "Type": "jwt", "MaxTokenTTL": "60s", "Config": config}

    async def is_created() -> bool:
        return (await real.request("PUT", "/v1/acl/auth-method", method))[0] == 200

    await until(is_created)
    rules = 'service_prefix "" { policy = "write" } node_prefix "" { policy = "write" }'
    for path, body in (
        ("/v1/acl/policy", {"Name": "registrar", "Rules": rules}),
        ("/v1/acl/role", {"Name": "registrar", "Policies": [{"Name": "registrar"}]}),
        (
            "/v1/acl/binding-rule",
            {
                "AuthMethod": "jwt",
                "BindType": "role",
                "BindName": "registrar",
                "Selector": "value.team==metrics",
            },
        ),
    ):
        assert (await real.request("PUT", path, body))[0] == 200


class Signer:
    """A key pair that signs JSON Web Tokens (RS256)."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        self.public = self._key.public_key().public_bytes(encoding, form).decode()

    def token(self, seconds: float, **claims: str) -> str:
        """Return a token that expires in this many seconds."""
        now = int(time.time())
        times = {"iat": now - 900, "nbf": now - 900, "exp": now + int(seconds)}
        parts = ({"alg": "RS256", "typ": "JWT"}, {"sub": "pod", "aud": "consul", **times, **claims})
        signed = b".".join(_base64(json.dumps(part).encode()) for part in parts)
        signature = self._key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return b".".join((signed, _base64(signature))).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
