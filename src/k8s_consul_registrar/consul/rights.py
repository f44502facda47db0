"""What our token may do, asked without doing it."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulRefused

# Consul's own web interface asks here; there since 1.7, and it writes nothing.
AUTHORIZE = "/v1/internal/acl/authorize"


class Right(NamedTuple):
    """One right in the words of Consul's ACL: `service` or `node`, its name, `read` or `write`."""

    resource: str
    segment: str
    access: str


class _Answer(msgspec.Struct, rename="pascal"):
    allow: bool


_answers = msgspec.json.Decoder(list[_Answer])


async def rights(client: ConsulClient, asked: Sequence[Right]) -> list[bool] | None:
    """Tell for each right whether the token has it, None where Consul runs without ACLs.

    Raises a `ConsulError`: `ConsulForbidden` for a token that is not known, `ConsulRefused` with status 404
    or 405 where this Consul cannot be asked.
    """
    body = msgspec.json.encode(
        [{"Resource": one.resource, "Segment": one.segment, "Access": one.access} for one in asked]
    )
    try:
        answer = await client.request("POST", AUTHORIZE, body=body)
    except ConsulRefused as refused:
        if refused.status == 401:  # "ACL support disabled"
            return None
        raise
    try:
        found = [one.allow for one in _answers.decode(answer.body)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"{AUTHORIZE} is not what Consul sends: {error}") from None
    if len(found) != len(asked):
        raise ConsulRefused(f"{AUTHORIZE} answers {len(found)} of {len(asked)} questions")
    return found
