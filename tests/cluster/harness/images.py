# SPDX-License-Identifier: Apache-2.0
"""Container images without a registry.

Sidecars, busybox and pause are one-layer archives around one program, under the names that the
manifests use. Not its business: the driver's image (driver_image.py).
"""

import hashlib
import io
import json
import platform
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness import node, programs
from tests.cluster.harness.processes import run

SIDECARS = {  # program -> the module that carries its version
    "csi-provisioner": "external-provisioner/v6",
    "csi-resizer": "external-resizer/v2",
    "csi-attacher": "external-attacher/v4",
    "csi-snapshotter": "external-snapshotter/v8",
    "snapshot-controller": "external-snapshotter/v8",
}
BUSYBOX_IMAGE = "docker.io/library/busybox:1.37"  # as the examples name it


@dataclass(frozen=True)
class Image:
    name: str
    program: Path
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    links: tuple[str, ...] = ()  # further names of the program


def directory() -> Path:
    return programs.cache_directory() / "images"


def build_all() -> list[Path]:
    """The archives that every node loads, made now where they are missing."""
    directory().mkdir(parents=True, exist_ok=True)
    return [_build(image) for image in _all()]


def _all() -> list[Image]:
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    applets = tuple(sorted(set(run(busybox, "--list").split()) - {"busybox"}))
    sleep = ("/bin/busybox", "sleep", "2147483647")
    return [
        Image(node.PAUSE_IMAGE, busybox, entrypoint=sleep),
        Image(BUSYBOX_IMAGE, busybox, command=("sh",), links=applets),
        *(_sidecar(name, module) for name, module in SIDECARS.items()),
    ]


def _sidecar(name: str, module: str) -> Image:
    version = programs.module_version("kubernetes", f"{programs.CSI}/{module}")
    program = programs.bin_directory() / name
    return Image(f"registry.k8s.io/sig-storage/{name}:{version}", program, entrypoint=(f"/bin/{name}",))


def _build(image: Image) -> Path:
    archive = directory() / (image.name.replace("/", "_").replace(":", "_") + ".tar")
    if not archive.exists():
        unfinished = archive.with_suffix(".unfinished")
        _write_archive(image, unfinished)
        unfinished.rename(archive)
    return archive


def _write_archive(image: Image, path: Path) -> None:
    """An OCI image layout in a tar file, as `ctr images import` takes it."""
    layer = _layer(image)
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "config": {
            "Env": ["PATH=/bin"],
            "Entrypoint": list(image.entrypoint) or None,
            "Cmd": list(image.command) or None,
        },
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor(_json(config), "application/vnd.oci.image.config.v1+json"),
        "layers": [_descriptor(layer, "application/vnd.oci.image.layer.v1.tar")],
    }
    entry = _descriptor(_json(manifest), str(manifest["mediaType"]))
    entry["annotations"] = {"io.containerd.image.name": image.name}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    with tarfile.open(path, "w") as archive:
        _add_file(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add_file(archive, "index.json", _json(index))
        for blob in (layer, _json(config), _json(manifest)):
            _add_file(archive, f"blobs/{_digest(blob).replace(':', '/')}", blob)


def _layer(image: Image) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, mode
            archive.addfile(directory)
        _add_file(archive, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
        _add_file(archive, "etc/group", b"root:x:0:\n")
        _add_file(archive, f"bin/{image.program.name}", image.program.read_bytes(), mode=0o755)
        for name in image.links:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, image.program.name
            archive.addfile(link)
    return buffer.getvalue()


def _add_file(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _descriptor(content: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}
