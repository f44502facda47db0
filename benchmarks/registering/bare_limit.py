"""The bare limit of a cold start: its parts without the program, and the original's algorithm beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from registering.observing import TRANSACTION, require
from registering.processes import LOOPBACK, consul, free_ports
from registering.stage import NODE, Api, Checkout, registrar, run_small

_TRANSACTIONS_IN_FLIGHT = "8"
_PUTS_IN_FLIGHT = "32"
_MOST_FOR_ORIGINAL = 10_000  # services above which the original takes too long


async def beside(
    folder: Path,
    checkout: Checkout,
    api: Api,
    services: Sequence[dict[str, Any]],
    *,
    backend: str,
    took: float,
) -> list[str]:
    """Measure the limit of a cold start that wrote these services, and describe both."""
    startup = await start_up(folder, checkout, api)
    if backend == "catalog":
        listing = (await run_small("bare.py", "list", api.url, str(api.ca), api.token))["seconds"]
        writing = await _transactions(folder, services)
        limit = startup + max(listing, writing)
        parts = f"start-up {startup:.2f} s, bare list {listing:.2f} s, bare transactions {writing:.2f} s"
        notes = [f"bare limit {limit:.2f} s ({parts}), {took / limit:.2f} times it"]
    else:
        writing = await _puts(folder, services)
        notes = [f"bare PUTs {writing:.2f} s, {took / writing:.2f} times it"]
    if len(services) <= _MOST_FOR_ORIGINAL:
        said = await original(api, len(services))
        notes.append(f"original {said['wall']:.1f} s, {said['peak_mb']:.0f} MB")
    return notes


async def start_up(folder: Path, checkout: Checkout, api: Api) -> float:
    """Return the seconds until a registrar answers that reaches no Consul."""
    nowhere = f"{LOOPBACK}:{free_ports(1)[0]}"
    async with registrar(folder, checkout, api, nowhere) as run:
        return await run.until_answering()


async def original(api: Api, targets: int) -> dict[str, Any]:
    """Run the original's algorithm once over an empty Consul; its `wall` is the whole program."""
    async with consul() as address:
        said = await run_small("original.py", api.url, str(api.ca), api.token, address)
    require(said["registered"], targets)
    return said


async def _transactions(folder: Path, services: Sequence[dict[str, Any]]) -> float:
    node = {"Node": {"Verb": "set", "Node": {"Node": NODE, "Address": LOOPBACK}}}
    lines = [msgspec.json.encode([node])]
    for at in range(0, len(services), TRANSACTION):
        operations = [
            {"Service": {"Verb": "set", "Node": NODE, "Service": _body(service)}}
            for service in services[at : at + TRANSACTION]
        ]
        lines.append(msgspec.json.encode(operations))
    file = folder / "transactions"
    file.write_bytes(b"\n".join(lines))
    async with consul() as address:
        said = await run_small("bare.py", "transactions", address, str(file), _TRANSACTIONS_IN_FLIGHT)
    return float(said["seconds"])


async def _puts(folder: Path, services: Sequence[dict[str, Any]]) -> float:
    file = folder / "puts"
    file.write_bytes(b"\n".join(msgspec.json.encode(_registration(service)) for service in services))
    async with consul() as address:
        said = await run_small("bare.py", "puts", address, str(file), _PUTS_IN_FLIGHT)
    return float(said["seconds"])


def _body(service: dict[str, Any]) -> dict[str, Any]:
    return {key: service[key] for key in ("ID", "Service", "Address", "Port", "Meta")}


def _registration(service: dict[str, Any]) -> dict[str, Any]:
    return {("Name" if key == "Service" else key): value for key, value in _body(service).items()}
