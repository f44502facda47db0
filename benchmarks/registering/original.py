"""A literal reading of what the original program's README says it does in one period, once.

It lists all Pods and all Nodes, each as one body; reads the agent's services; registers what is missing, one
after the other; and would deregister what is gone. `original.py URL CA TOKEN CONSUL`.
"""

import gzip
import http.client
import json
import resource
import ssl
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

CLUSTER = "bench"


def read(api: http.client.HTTPSConnection, path: str, token: str) -> list[dict[str, Any]]:
    api.request("GET", path, headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"})
    answer = api.getresponse()
    body = answer.read()
    if answer.headers.get("Content-Encoding") == "gzip":
        body = gzip.decompress(body)
    items: list[dict[str, Any]] = json.loads(body)["items"]
    return items


def registrations(pods: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pod in pods:
        meta = pod["metadata"]
        annotations = meta.get("annotations") or {}
        if annotations.get("prometheus.io/scrape") == "true":
            name = f"pod--{meta['namespace']}--{meta['name']}"
            path = annotations.get("prometheus.io/path", "/metrics")
            about = {"metrics_path": path, "cluster": CLUSTER, "namespace": meta["namespace"]}
            port = int(annotations.get("prometheus.io/port", 80))
            yield {"ID": name, "Name": name, "Address": pod["status"]["podIP"], "Port": port, "Meta": about}
    for node in nodes:
        address = next(one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
        path = f"/api/v1/nodes/{address}:10250/metrics/cadvisor"
        about = {"metrics_path": path, "cluster": CLUSTER}
        name = f"node--{address}"
        yield {"ID": name, "Name": name, "Address": address, "Port": 31112, "Meta": about}


def put(consul: http.client.HTTPConnection, path: str, body: Any = None) -> None:
    consul.request("PUT", path, body=json.dumps(body) if body else None)
    answer = consul.getresponse()
    answer.read()
    if answer.status != 200:
        sys.exit(f"Consul answers {answer.status}")


def main() -> None:
    url, ca, token, address = sys.argv[1:]
    started = time.perf_counter()
    host = urlsplit(url).netloc
    api = http.client.HTTPSConnection(host, context=ssl.create_default_context(cafile=ca))
    wanted = list(registrations(read(api, "/api/v1/pods", token), read(api, "/api/v1/nodes", token)))
    listed = time.perf_counter() - started
    consul = http.client.HTTPConnection(address)
    consul.request("GET", "/v1/agent/services")
    there = json.loads(consul.getresponse().read())
    missing = [one for one in wanted if one["ID"] not in there]
    for one in missing:
        put(consul, "/v1/agent/service/register", one)
    for gone in there.keys() - {one["ID"] for one in wanted}:
        if there[gone]["Meta"].get("cluster") == CLUSTER:
            put(consul, f"/v1/agent/service/deregister/{gone}")
    said = {
        "seconds": time.perf_counter() - started,
        "listing": listed,
        "registered": len(missing),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
