# SPDX-License-Identifier: Apache-2.0
"""Runs csi-sanity, the conformance suite of CSI, against a served driver: `make sanity BACKEND=image`.

Each settings of a backend (mounted volumes, block volumes) gets a fresh pool and a fresh driver. What counts as good
is `report`'s business; the machine is left as it was found.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from tests.sanity.report import Verdict, judge, parse_report, read_expected_skips
from tests.sanity.scratch import Scratch, scratch

ROOT = Path(__file__).parents[2]
ORLOP = Path(sys.executable).parent / "orlop"
SKIPS = Path(__file__).parent / "skips.txt"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
SANITY_TIMEOUT_S = 1200.0
# Deleted volumes are removed in the background.
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Settings:
    """One way to run the suite."""

    name: str
    access_type: str = "mount"
    parameters: str = ""
    """The StorageClass's, as YAML."""
    left_out: str = ""
    """A pattern of specs that this machine cannot run; each is listed in skips.txt, with why."""
    filesystem: str = ""
    """What the pool lies on, if not what the backend usually does."""
    expansion: str = "node"
    """Who grows volumes."""


@dataclass(frozen=True)
class Backend:
    filesystem: str
    """What the pool lies on."""
    settings: tuple[Settings, ...]
    options: str = ""
    """Further lines of the pool's table."""


# Only a process with this capability may grow a mounted ext4; a container may lack it even as root.
CAP_SYS_RESOURCE = 24
MOUNT = Settings("mount")
MOUNT_WITHOUT_CAPABILITY = Settings(
    "mount-without-CAP_SYS_RESOURCE", left_out="should work if node-expand is called after node-publish"
)
# As in a cluster of one node: then only the calls to attach are left.
CONTROLLER = Settings("controller", expansion="controller")
# A VolumeAttributesClass that every backend can do.
MUTABLE = "retention: 0s\n"
# It compares two topologies with what their serialization has left in them, and no answer that has one passes.
WRONG_IN_THE_SUITE = "should succeed when creating a snapshot with accessibility requirements"
BACKENDS = {
    # xfs as well: it grows mounted without that capability, so growth is proven on every machine.
    "image": Backend(
        "ext4",
        (
            MOUNT,
            Settings("xfs", parameters="fsType: xfs\n"),
            Settings("block", "block"),
            # Copies share blocks.
            Settings(
                "reflink-controller", parameters="fsType: xfs\n", filesystem="xfs", expansion="controller"
            ),
        ),
    ),
    # The pool's filesystem has no project quota here; sizes that are not enforced must be said to be.
    "directory": Backend("ext4", (MOUNT, CONTROLLER), "enforce_capacity = false\n"),
    "btrfs": Backend("btrfs", (MOUNT, CONTROLLER), "enable_quota = true\n"),
}


class RunFailed(Exception):
    """The run could not be made, or found something wrong."""


def write_config(place: Scratch, name: str, settings: Settings) -> Path:
    path = place.root / "orlop.toml"
    path.write_text(
        'driver_name = "sanity.orlop.dev"\n'
        'node_id = "sanity-node"\n'
        f'expansion = "{settings.expansion}"\n\n'
        "[pools.sanity]\n"
        f'backend = "{name}"\n'
        f'root = "{place.pool}"\n'
        f"{BACKENDS[name].options}",
        encoding="utf-8",
    )
    return path


def wait_for_socket(driver: subprocess.Popen[bytes], socket: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not socket.is_socket():
        if driver.poll() is not None:
            raise RunFailed(
                f"orlop serve ended with {driver.returncode} before its socket was there: {said(socket)}"
            )
        if time.monotonic() > deadline:
            raise RunFailed(f"orlop serve made no socket within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.02)


def said(socket: Path) -> str:
    """The driver's last words."""
    lines = (socket.parent / "driver.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


def stop(driver: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and an orderly end; a driver that does not end is killed and told of."""
    if driver.poll() is None:
        driver.send_signal(signal.SIGTERM)
    try:
        driver.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        raise RunFailed(f"orlop serve did not end within {STOP_TIMEOUT_S:.0f} s of SIGTERM") from None


@contextmanager
def served(place: Scratch, config: Path, socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = place.root / "driver.log"
    with log.open("wb") as output:
        argv: list[str | Path] = [ORLOP, "serve", "--config", config, "--endpoint", f"unix://{socket}"]
        driver = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            wait_for_socket(driver, socket)
            yield driver
        finally:
            stop(driver)
    if driver.returncode != 0:
        raise RunFailed(f"orlop serve ended with {driver.returncode} after SIGTERM")


def run_sanity(program: Path, place: Scratch, socket: Path, settings: Settings) -> str:
    """Its report as JSON; its exit code says less than that, and is not asked."""
    report = place.root / "report.json"
    argv: list[str | Path] = [
        program,
        f"--csi.endpoint=unix://{socket}",
        f"--csi.mountdir={place.root}/published",
        f"--csi.stagingdir={place.root}/staged",
        f"--csi.testvolumeaccesstype={settings.access_type}",
        "--ginkgo.no-color",
        f"--ginkgo.json-report={report}",
    ]
    mutable = place.root / "mutable.yaml"
    mutable.write_text(MUTABLE, encoding="utf-8")
    argv.append(f"--csi.testvolumemutableparameters={mutable}")
    if settings.parameters:
        parameters = place.root / "parameters.yaml"
        parameters.write_text(settings.parameters, encoding="utf-8")
        argv.append(f"--csi.testvolumeparameters={parameters}")
    argv += [f"--ginkgo.skip={pattern}" for pattern in (settings.left_out, WRONG_IN_THE_SUITE) if pattern]
    with (place.root / "sanity.log").open("wb") as output:
        subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=SANITY_TIMEOUT_S,
            check=False,
        )
    if not report.is_file():
        raise RunFailed("csi-sanity wrote no report")
    return report.read_text(encoding="utf-8")


def leaks_after_settling(place: Scratch) -> list[str]:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while (leaks := place.leaks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return leaks


def tracebacks(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return ["a traceback in the driver's log"] if "Traceback (most recent call last)" in text else []


def run_settings(program: Path, backend: str, settings: Settings, keep: Path) -> Verdict:
    with scratch(settings.filesystem or BACKENDS[backend].filesystem) as place:
        socket = place.root / "csi.sock"
        try:
            with served(place, write_config(place, backend, settings), socket):
                specs = parse_report(run_sanity(program, place, socket, settings))
                left = leaks_after_settling(place)
            found = judge(f"{backend}/{settings.name}", specs, read_expected_skips(SKIPS))
            left += tracebacks(place.root / "driver.log")
            return Verdict(found.passed, found.skipped, (*found.complaints, *left))
        finally:
            keep_logs(place, keep)


def keep_logs(place: Scratch, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("orlop.toml", "driver.log", "sanity.log", "report.json"):
        if (place.root / name).exists():
            shutil.copy(place.root / name, folder / name)


def require_machine() -> Path:
    """csi-sanity's path. Exits: with 0 and a reason where it cannot run on a laptop, with 1 where CI=true."""
    script = ROOT / "tools" / "csi-sanity"
    if os.geteuid() != 0:
        give_up("the driver mounts: run it as root")
    if subprocess.run([script], stdin=subprocess.DEVNULL, timeout=1200, check=False).returncode != 0:
        give_up("csi-sanity could not be built")
    done = subprocess.run([script, "--path"], capture_output=True, text=True, timeout=10, check=True)
    return Path(done.stdout.strip())


def give_up(reason: str) -> NoReturn:
    in_ci = os.environ.get("CI") == "true"
    print(f"sanity: {'FAILED' if in_ci else 'SKIPPED'}: {reason}", file=sys.stderr)
    sys.exit(1 if in_ci else 0)


def settings_here(backend: str) -> tuple[Settings, ...]:
    """The settings to run on this machine."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    if backend != "image" or int(effective, 16) >> CAP_SYS_RESOURCE & 1:
        return BACKENDS[backend].settings
    return tuple(MOUNT_WITHOUT_CAPABILITY if one is MOUNT else one for one in BACKENDS[backend].settings)


def run_and_tell(program: Path, backend: str, settings: Settings, keep: Path) -> bool:
    began = time.monotonic()
    try:
        verdict = run_settings(program, backend, settings, keep)
    except (RunFailed, RuntimeError, subprocess.TimeoutExpired) as error:
        verdict = Verdict(0, 0, (str(error),))
    outcome = "FAILED" if verdict.complaints else "ok"
    counts = f"{verdict.passed} passed, {verdict.skipped} skipped, {time.monotonic() - began:.0f} s"
    print(f"sanity {backend}/{settings.name}: {outcome}: {counts}")
    for complaint in verdict.complaints:
        print(f"  {complaint}")
    if verdict.complaints:
        print(f"  logs: {keep}", flush=True)
    return not verdict.complaints


def main() -> int:
    parser = argparse.ArgumentParser(description="Run csi-sanity against a served driver.")
    parser.add_argument("--backend", choices=BACKENDS, default="image")
    parser.add_argument("--logs", type=Path, default=ROOT / ".cache" / "sanity", help="where logs are kept")
    parser.add_argument("--settings", default="*", metavar="PATTERN", help="which settings of the backend")
    arguments = parser.parse_args()
    program = require_machine()
    logs: Path = arguments.logs / arguments.backend
    good = [
        run_and_tell(program, arguments.backend, settings, logs / settings.name)
        for settings in settings_here(arguments.backend)
        if fnmatchcase(settings.name, arguments.settings)
    ]
    if not good:
        parser.error(
            f"--settings {arguments.settings!r}: backend {arguments.backend} has none that are called so"
        )
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
