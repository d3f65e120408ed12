# SPDX-License-Identifier: Apache-2.0
"""The cluster's own certificate authority, its certificates and kubeconfigs."""

import json
from pathlib import Path

from tests.cluster.harness import layout
from tests.cluster.harness.processes import run


def make_all(nodes: list[layout.Node]) -> None:
    layout.PKI.mkdir(parents=True, mode=0o700)
    _make_authority()
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
    addresses = [layout.API_ADDRESS, "127.0.0.1"]
    alternatives = ",".join([f"DNS:{name}" for name in names] + [f"IP:{address}" for address in addresses])
    _make_certificate("apiserver", "/CN=kube-apiserver", alternatives)
    _make_client("admin", "/O=system:masters/CN=admin")
    _make_client("controller-manager", "/CN=system:kube-controller-manager")
    _make_client("scheduler", "/CN=system:kube-scheduler")
    for node in nodes:
        _make_client(node.name, f"/O=system:nodes/CN=system:node:{node.name}")


def _make_authority() -> None:
    key, certificate = layout.PKI / "ca.key", layout.PKI / "ca.crt"
    _make_key(key)
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
    request: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-new",
        "-key",
        key,
        "-days",
        "3650",
        "-subj",
        "/CN=orlop-test",
    ]
    run(*request, "-out", certificate, *(part for value in extensions for part in ("-addext", value)))
    accounts = layout.PKI / "service-accounts.key"
    _make_key(accounts)
    run("openssl", "pkey", "-in", accounts, "-pubout", "-out", accounts.with_suffix(".pub"))


def _make_client(name: str, subject: str) -> None:
    _make_certificate(name, subject)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "orlop-test", "cluster": _server()}],
        "users": [{"name": name, "user": _credentials(name)}],
        "contexts": [{"name": "orlop-test", "context": {"cluster": "orlop-test", "user": name}}],
        "current-context": "orlop-test",
    }
    (layout.PKI / f"{name}.kubeconfig").write_text(json.dumps(config))


def _server() -> dict[str, str]:
    return {
        "server": f"https://{layout.API_ADDRESS}:443",
        "certificate-authority": str(layout.PKI / "ca.crt"),
    }


def _credentials(name: str) -> dict[str, str]:
    return {
        "client-certificate": str(layout.PKI / f"{name}.crt"),
        "client-key": str(layout.PKI / f"{name}.key"),
    }


def _make_certificate(name: str, subject: str, alternatives: str = "") -> None:
    key, request, extensions = (layout.PKI / f"{name}.{end}" for end in ("key", "csr", "ext"))
    _make_key(key)
    run("openssl", "req", "-new", "-key", key, "-subj", subject, "-out", request)
    lines = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth,clientAuth"]
    lines += [f"subjectAltName={alternatives}"] if alternatives else []
    extensions.write_text("\n".join(lines) + "\n")
    authority: list[str | Path] = [
        "-CA",
        layout.PKI / "ca.crt",
        "-CAkey",
        layout.PKI / "ca.key",
        "-CAcreateserial",
    ]
    sign: list[str | Path] = [
        "openssl",
        "x509",
        "-req",
        "-in",
        request,
        *authority,
        "-days",
        "3650",
        "-extfile",
        extensions,
    ]
    run(*sign, "-out", layout.PKI / f"{name}.crt")


def _make_key(path: Path) -> None:
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)
