# SPDX-License-Identifier: Apache-2.0
"""The fallback: Debian's ordinary kernel in an emulated machine, without KVM. Everything computes ten times slower.

The kernel is unpacked into a cache, not installed: no boot loader of this machine ever hears of it.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from tests.lab.kernel.machine import INIT, Channels, Job

# What it takes to reach the machine's tree by 9p; in the order of loading.
MODULES = (
    *(
        "virtio_ring",
        "virtio",
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_pci",
        "virtio_console",
    ),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "overlay"),
)
FIRST_PROGRAM = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in {" ".join(MODULES)}; do $b insmod /modules/$module.ko; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose root /machine || exec $b poweroff -f
cd /machine
# Moved to /, not just entered: user namespaces are not allowed in a chroot.
$b mount --move . /
exec $b chroot . {INIT}
"""


def cache() -> Path:
    return Path(os.environ.get("ORLOP_CACHE", Path.home() / ".cache/orlop")) / "lab-kernel"


def ensure_kernel() -> str:
    """Unpack a kernel into the cache, unless there is one; why that cannot be, or ""."""
    if (cache() / "initrd").exists():
        return ""
    cache().mkdir(parents=True, exist_ok=True)
    try:
        _unpack()
    except subprocess.CalledProcessError as error:
        return f"a kernel for qemu cannot be had: {error.cmd}: {error.stderr.strip()[-500:]}"
    (cache() / "initrd.new").write_bytes(_initrd())
    (cache() / "initrd.new").rename(cache() / "initrd")
    return ""


def _unpack() -> None:
    depends = _output("apt-cache", "depends", "linux-image-amd64")
    package = re.findall(r"Depends: (linux-image-\d\S+)", depends)[0]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # apt downloads as a user of its own
        _output("apt-get", "download", "-qq", package, cwd=folder)
        archive = next(Path(folder).glob("*.deb"))
        _output("dpkg-deb", "-x", archive, cache())
    _output("/sbin/depmod", "-b", cache(), package.removeprefix("linux-image-"))


def _output(*words: str | Path, cwd: str | None = None) -> str:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True).stdout


def _kernel() -> tuple[Path, Path]:
    """The kernel and its modules."""
    image = sorted((cache() / "boot").glob("vmlinuz-*"))[-1]
    return image, cache() / "lib/modules" / image.name.removeprefix("vmlinuz-")


def argv(job: Job, channels: Channels) -> list[str]:
    image, modules = _kernel()
    shares = [_share("root", "/", "on"), _share("exchange", "/run/lab", "off")]
    shares += [
        _share(f"writable{number}", os.fspath(path), "off") for number, path in enumerate(job.writable)
    ]
    words = f"console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 LAB_MODULES={modules}"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,la57=off", "-smp", "2"),
        *("-m", job.memory, "-kernel", os.fspath(image), "-initrd", os.fspath(cache() / "initrd")),
        *("-append", words, "-serial", f"file:/dev/fd/{channels.log}"),
        *(word for share in shares for word in share),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"file,id=stdout,path=/dev/fd/{channels.stdout}"),
        *("-device", "virtserialport,chardev=stdout,nr=1"),
        *("-chardev", f"file,id=stderr,path=/dev/fd/{channels.stderr}"),
        *("-device", "virtserialport,chardev=stderr,nr=2"),
    ]


def _share(tag: str, path: str, read_only: str) -> list[str]:
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap,readonly={read_only}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def _initrd() -> bytes:
    """A cpio archive (newc): busybox, the modules, and the script that reaches the machine's tree."""
    found = {path.stem: path for path in _kernel()[1].glob("kernel/**/*.ko")}
    files = [(f"modules/{name}.ko", found[name].read_bytes()) for name in MODULES if name in found]
    files += [("bin/busybox", Path("/bin/busybox").read_bytes()), ("init", FIRST_PROGRAM.encode())]
    folders = [(name, 0o40755, b"") for name in ("dev", "proc", "machine", "modules", "bin")]
    entries = [*folders, *((name, 0o100755, data) for name, data in files), ("TRAILER!!!", 0, b"")]
    return b"".join(_cpio(number, *entry) for number, entry in enumerate(entries, 1))


def _cpio(number: int, name: str, mode: int, data: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return b"".join(part + b"\0" * (-len(part) % 4) for part in (head, data))
