# SPDX-License-Identifier: Apache-2.0
"""The driver's image, built from the repository's Dockerfile without an engine and without a registry.

buildah runs the Dockerfile in a chroot, on a Debian base that mmdebstrap makes and that is tagged as the
Dockerfile's FROM line names it. The base carries this machine's certificates and pip configuration, so
that the build reaches what this machine reaches, and nothing else that the image of that name has not.
"""

import configparser
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.harness import programs
from tests.cluster.harness.processes import environment

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = REPOSITORY / "Dockerfile"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Not their usual place in the base: the package ca-certificates, should a Dockerfile install it, rewrites that.
CERTIFICATES_IN_BASE = "/etc/ssl/machine.crt"
PIP_CONFIGURATIONS = (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf")
SUITES = {"12": "bookworm", "13": "trixie"}
"""What Debian's archive calls a release; mmdebstrap makes its newest point release, whichever the Dockerfile pins."""
STORAGE = programs.cache_directory() / "buildah"


def build_version(name: str, version: str) -> Path:
    """Build the image `name` from this tree, but as if it were of another version."""
    with tempfile.TemporaryDirectory(prefix="orlop-source.") as directory:
        source = Path(directory)
        for file in ("Dockerfile", ".dockerignore", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(REPOSITORY / file, source)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "csi_driver", source / "csi_driver", ignore=ignored)
        module = source / "csi_driver/__init__.py"
        text, found = re.subn(
            r'^__version__ = ".*"$', f'__version__ = "{version}"', module.read_text(), flags=re.M
        )
        if found != 1:
            raise LookupError(f"{module} has {found} lines with __version__")
        module.write_text(text)
        return build(name, source, version)


def build(name: str, source: Path = REPOSITORY, version: str = "dev") -> Path:
    """Build the image `name` and return its archive for `ctr images import`."""
    STORAGE.mkdir(parents=True, exist_ok=True)
    base = _base_image_name()
    if _buildah("images", "--quiet", "--filter", f"reference={base}", check=False).strip() == "":
        _make_base(base)
    print(f"building {name}", flush=True)
    options = ["--layers", "--network", "host", "--pull-never", "--tag", name]
    options += ["--build-arg", f"VERSION={version}"]
    _buildah("bud", *options, os.fspath(source), log="build-image.log")
    result = archive(name)
    result.parent.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    _buildah("push", "--quiet", name, f"docker-archive:{result}:{name}")
    return result


def archive(name: str) -> Path:
    """Where `build` leaves the image `name`."""
    return programs.cache_directory() / "images" / f"driver-{name.rpartition(':')[2]}.tar"


def _base_image_name() -> str:
    names = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    return f"docker.io/library/{names[0]}" if "/" not in names[0] else str(names[0])


def _make_base(name: str) -> None:
    print(f"making {name} by mmdebstrap (about a minute, once)", flush=True)
    archive = STORAGE / "base.tar"
    suite = SUITES[name.rpartition(":")[2].partition(".")[0]]
    _run(["mmdebstrap", "--quiet", "--variant=minbase", suite, os.fspath(archive)], log="build-base.log")
    container = _buildah("from", "scratch").strip()
    _buildah("add", container, os.fspath(archive), "/")
    if CERTIFICATES.exists():
        _buildah("copy", container, os.fspath(CERTIFICATES), CERTIFICATES_IN_BASE)
    _buildah("copy", container, os.fspath(_write_pip_configuration()), "/etc/pip.conf")
    _buildah("commit", "--quiet", "--rm", container, name)
    archive.unlink()


def _write_pip_configuration() -> Path:
    """This machine's pip configuration, with the certificates where the base has them."""
    settings = configparser.ConfigParser()
    settings.read(PIP_CONFIGURATIONS)
    if CERTIFICATES.exists():
        settings.read_dict({"global": {"cert": CERTIFICATES_IN_BASE}})
    path = STORAGE / "pip.conf"
    with path.open("w") as file:
        settings.write(file)
    return path


def _buildah(*arguments: str, log: str | None = None, check: bool = True) -> str:
    where = ["--root", os.fspath(STORAGE / "root"), "--runroot", os.fspath(STORAGE / "run")]
    return _run(["buildah", *where, "--storage-driver", _storage_driver(), *arguments], log=log, check=check)


def _storage_driver() -> str:
    """Overlays cannot be stacked: where the cache lies on one (in a container), layers are copied, which is slow."""
    kind = subprocess.run(["stat", "--file-system", "--format=%T", STORAGE], capture_output=True, check=True)
    return "vfs" if kind.stdout.strip() == b"overlayfs" else "overlay"


def _run(command: list[str], log: str | None = None, check: bool = True) -> str:
    done = subprocess.run(
        command,
        env=environment() | {"BUILDAH_ISOLATION": "chroot"},
        capture_output=True,
        text=True,
        check=False,
    )
    if log is not None:
        path = programs.cache_directory() / "log" / log
        path.parent.mkdir(exist_ok=True)
        path.write_text(done.stdout + done.stderr)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
