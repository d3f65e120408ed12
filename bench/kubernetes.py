# SPDX-License-Identifier: Apache-2.0
"""The API server as a benchmark needs it: cheap requests, and the moments at which objects got where they are going.

kubectl costs more processor time than what is to be measured. Not this module's business: what is measured.
"""

import http.client
import json
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tests.cluster.harness import layout

Object = dict[str, Any]


class Api:
    """Requests as the cluster's administrator; each thread has a connection of its own."""

    def __init__(self) -> None:
        self._context = ssl.create_default_context(cafile=str(layout.PKI / "ca.crt"))
        self._context.load_cert_chain(str(layout.PKI / "admin.crt"), str(layout.PKI / "admin.key"))
        self._own = threading.local()

    def request(self, method: str, path: str, body: Object | None = None) -> Object:
        """The answer's object; raises what the server has to say where it is no success."""
        answer: Object = json.loads(self.text(path, method, body))
        return answer

    def text(self, path: str, method: str = "GET", body: Object | None = None) -> str:
        if not hasattr(self._own, "connection"):
            self._own.connection = self._connect()
        connection: http.client.HTTPSConnection = self._own.connection
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        said = response.read().decode()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {said}")
        return said

    def watch(self, path: str) -> Iterator[Object]:
        """Events for ever, beginning with what is there."""
        connection = self._connect()
        connection.request("GET", f"{path}?watch=1")
        response = connection.getresponse()
        while line := response.readline():
            yield json.loads(line)

    def _connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(layout.API_ADDRESS, 443, context=self._context, timeout=3600)


class Moments:
    """When each pod and its claim reached a stage, as it was seen from here: `of[name][stage]`, by the monotonic clock."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.of: dict[str, dict[str, float]] = defaultdict(dict)
        self._changed = threading.Condition()
        inside = f"/api/v1/namespaces/{namespace}"
        sources = {
            f"{inside}/pods": _stages_of_pod,
            f"{inside}/persistentvolumeclaims": _stages_of_claim,
            "/api/v1/persistentvolumes": _stages_of_volume,
        }
        for path, stages in sources.items():
            threading.Thread(target=self._follow, args=(api, path, stages), daemon=True).start()

    def note(self, name: str, stage: str) -> None:
        with self._changed:
            self.of[name].setdefault(stage, time.monotonic())
            self._changed.notify_all()

    def wait(self, names: list[str], stage: str, timeout_s: float) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: all(stage in self.of[name] for name in names), timeout_s)
        if not done:
            late = [name for name in names if stage not in self.of[name]]
            raise TimeoutError(f"{len(late)} of {len(names)} not {stage} after {timeout_s:.0f} s: {late[:5]}")

    def _follow(self, api: Api, path: str, stages: Any) -> None:
        for event in api.watch(path):
            for name, stage in stages(event["type"], event["object"]):
                self.note(name, stage)


def _stages_of_pod(change: str, pod: Object) -> Iterator[tuple[str, str]]:
    name = pod["metadata"]["name"]
    if change == "DELETED":
        yield name, "gone"
    if "nodeName" in pod["spec"]:
        yield name, "scheduled"
    if pod["status"].get("phase") == "Running":
        yield name, "running"


def _stages_of_claim(change: str, claim: Object) -> Iterator[tuple[str, str]]:
    name = claim["metadata"]["name"]
    if "volume.kubernetes.io/selected-node" in claim["metadata"].get("annotations", {}):
        yield name, "selected"
    if claim["status"].get("phase") == "Bound":
        yield name, "bound"


def _stages_of_volume(change: str, volume: Object) -> Iterator[tuple[str, str]]:
    if "claimRef" in volume["spec"]:
        name = volume["spec"]["claimRef"]["name"]
        yield name, "volume gone" if change == "DELETED" else "volume"
