# SPDX-License-Identifier: Apache-2.0
"""Makes the driver known to kubelet, so that a node needs no registrar beside it (plugin registration, version 1).

Kubelet watches a directory for sockets, asks each what it is, and tells it whether it was taken in. Whether kubelet
then calls, and what it is answered, is not this module's business.
"""

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from csi_driver.errors import ConfigurationError
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.interceptor import Interceptor
from csi_driver.rpc.pb import api_pb2 as pb
from csi_driver.rpc.server import Server, check_path

if TYPE_CHECKING:
    from csi_driver.rpc.pb.api_pb2_grpc import RegistrationServicer
else:
    # As in servicers: the generated module is for the types.
    RegistrationServicer = object

log = logging.getLogger(__name__)

WATCH_S = 5.0
"""How long a socket that somebody removed stays away, in seconds."""
REGISTRY = "plugins_registry"


class Registration:
    """The registration of one driver with the kubelet of `kubelet_dir`."""

    def __init__(self, kubelet_dir: Path, driver_name: str, endpoint: str, watch_s: float = WATCH_S) -> None:
        self._path = kubelet_dir / REGISTRY / f"{driver_name}-reg.sock"
        check_path(self._path)
        self._servicer = _Servicer(driver_name, endpoint)
        self._watch_s = watch_s
        self._server: Server | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="registration", daemon=True)

    def start(self) -> None:
        """Put the socket where kubelet finds it, now and whenever it has vanished.

        Raises:
            ConfigurationError: another process has it.
        """
        self._listen()
        self._thread.start()

    def stop(self) -> None:
        """Take the socket away: kubelet then calls the driver no more."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(self._watch_s + 5)
        if self._server is not None:
            self._server.stop(1.0)

    def problem(self) -> str:
        """Why kubelet does not know the driver now, or ""."""
        return self._servicer.problem

    def _watch(self) -> None:
        while not self._ending.wait(self._watch_s):
            if self._server is not None and self._server.is_listening():
                continue
            log.warning("registration socket %s is gone: made again", self._path)
            try:
                self._listen()
            except ConfigurationError as error:
                log.error("registration with kubelet: %s; tried again in %g s", error, self._watch_s)

    def _listen(self) -> None:
        if self._server is not None:
            self._server.stop(0)
            self._server = None
        self._servicer.problem = "kubelet has not asked for it yet"
        if not self._path.parent.is_dir():
            self._servicer.problem = (
                f"{self._path.parent} does not exist: is kubelet's directory mounted here?"
            )
            log.error(
                "registration with kubelet: %s; tried again in %g s", self._servicer.problem, self._watch_s
            )
            return
        service = pb.DESCRIPTOR.services_by_name["Registration"]
        server = Server(Interceptor([(service, self._servicer)], Calls()), workers=1, name="registration")
        server.listen(self._path)
        self._server = server


class _Servicer(RegistrationServicer):
    def __init__(self, driver_name: str, endpoint: str) -> None:
        self._driver_name = driver_name
        self._endpoint = endpoint
        self.problem = "not started"

    def GetInfo(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.PluginInfo:
        return pb.PluginInfo(
            type="CSIPlugin", name=self._driver_name, endpoint=self._endpoint, supported_versions=["1.0.0"]
        )

    def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.ServicerContext
    ) -> pb.RegistrationStatusResponse:
        if request.plugin_registered:
            self.problem = ""
            log.info("registered with kubelet", extra={"fields": {"driver": self._driver_name}})
        else:
            self.problem = f"kubelet refused it: {request.error}"
            log.error("kubelet refused the driver", extra={"fields": {"error": request.error}})
        return pb.RegistrationStatusResponse()
