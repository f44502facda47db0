"""Checks of Kubernetes objects as the API server would make them."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import kubernetes_validate


def assert_valid(each: Mapping[str, Any]) -> None:
    """Fail unless an object passes the API's schemas, strictly."""
    _validate(json.dumps(each, sort_keys=True))


@lru_cache(1000)  # many renderings share most of their objects
def _validate(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), kubernetes_validate.latest_version(), strict=True)


def pods_of(objects: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the Pod's spec of each Deployment."""
    return [one["spec"]["template"]["spec"] for one in objects.values() if one["kind"] == "Deployment"]


def nulls(value: Any, path: str = "") -> list[str]:
    """Return where an object has a null, for which `kubectl apply` says "configured" each time."""
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in nulls(inner, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for number, inner in enumerate(value) for found in nulls(inner, f"{path}[{number}]")]
    return [path] if value is None else []
