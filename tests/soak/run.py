# SPDX-License-Identifier: Apache-2.0
"""The soak: many clients do random lives of volumes while the driver is killed every few seconds and started anew.

At the end nothing may be lost, left or answered wrongly. Run by `test_soak`, in a mount namespace of its own; by hand:
`python -m tests.soak.run --seconds 60`. What a client may see is defined in `caller`, what it does in `volumes`.
"""

import argparse
import random
import sys
import threading
import time
from pathlib import Path

from bench.isolation import enter_own_namespace
from bench.scratch import scratch
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.soak.caller import Caller, Journal
from tests.soak.scene import SETTLE_S, SPACE_TOLERANCE, Scene, set_scene
from tests.soak.volumes import KINDS, Volume

VOLUMES = 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kill-every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--beneath", type=Path, default=Path("/var/tmp"))
    return parser.parse_args()


def make_volumes(folder: Path) -> list[Volume]:
    volumes = []
    for kind in KINDS:
        for number in range(kind.share * VOLUMES // 200):
            name = f"{kind.name}-{number}"
            (folder / name / "staging").mkdir(parents=True)
            targets = (folder / name / "target0", folder / name / "target1")
            volumes.append(Volume(kind, name, folder / name / "staging", targets, kind.size_bytes))
    return volumes


class Soak:
    """One run. All threads end at `deadline`."""

    def __init__(self, scene: Scene, volumes: list[Volume], arguments: argparse.Namespace) -> None:
        self.journal = Journal()
        self.kills = 0
        self.starts_s: list[float] = []
        self._scene = scene
        self._volumes = volumes
        self._owned = {volume.name: threading.Lock() for volume in volumes}
        self._arguments = arguments
        self._deadline = time.monotonic() + arguments.seconds

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._client, args=(number,)) for number in range(self._arguments.clients)
        ]
        for thread in threads:
            thread.start()
        self._kill_again_and_again()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        dice = random.Random(f"{self._arguments.seed}-{number}")
        caller = Caller(self._scene.driver.socket, self.journal)
        try:
            while time.monotonic() < self._deadline:
                volume = dice.choice(self._volumes)
                if dice.random() < 0.02:
                    self._list(caller)
                if self._owned[volume.name].acquire(blocking=False):
                    try:
                        volume.step(caller, dice)
                    finally:
                        self._owned[volume.name].release()
        except Exception as error:  # noqa: BLE001 - a client's death is a finding, not the end of the others
            self.journal.fault(f"client {number} ended: {type(error).__name__}: {error}")
        finally:
            caller.close()

    def _list(self, caller: Caller) -> None:
        """Every volume that stood before and after is in the list."""
        before = {volume.name: volume.id for volume in self._volumes if volume.id and not volume.kind.inline}
        lives = {volume.name: volume.lives for volume in self._volumes}
        answer = caller.call("ListVolumes", pb.ListVolumesRequest())
        if answer is None:
            return
        listed = {entry.volume.volume_id for entry in answer.entries}
        for volume in self._volumes:
            stood = volume.id and volume.id == before.get(volume.name) and volume.lives == lives[volume.name]
            owned = self._owned[volume.name]
            if stood and volume.id not in listed and owned.acquire(blocking=False):
                # Nobody works on it, so its id says what is true.
                owned.release()
                self.journal.fault(f"ListVolumes: {volume.id} stood all the time and is not listed")

    def _kill_again_and_again(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            time.sleep(min(left, self._arguments.kill_every))
            if time.monotonic() >= self._deadline:
                return
            self.journal.downs.append((time.monotonic(), float("inf")))
            self._scene.driver.kill()
            self.starts_s.append(self._scene.driver.start())
            self.journal.downs[-1] = (self.journal.downs[-1][0], time.monotonic())
            self.kills += 1


def end(scene: Scene, soak: Soak, volumes: list[Volume], free_at_start: dict[str, int]) -> None:
    """Walk every volume back to nothing, and see that nothing is what is left."""
    journal = soak.journal
    caller = Caller(scene.driver.socket, journal)
    for volume in volumes:
        while not volume.is_gone:
            faults = len(journal.faults)
            volume.step_back(caller)
            if len(journal.faults) > faults:
                break
    caller.close()
    for line in scene.settled():
        journal.fault(f"left behind: {line}")
    deadline = time.monotonic() + SETTLE_S
    # A filesystem may give space back behind its last commit.
    while (short := _short(scene, free_at_start)) and time.monotonic() < deadline:
        time.sleep(1)
    for name, free in short.items():
        journal.fault(f"pool {name}: {free} bytes free, {free_at_start[name]} at the start")


def _short(scene: Scene, free_at_start: dict[str, int]) -> dict[str, int]:
    """The pools that have less free than at the start, and how much they have."""
    free = scene.free_bytes()
    return {name: now for name, now in free.items() if now < free_at_start[name] - SPACE_TOLERANCE[name]}


def compare_descriptors(scene: Scene, journal: Journal) -> None:
    """The process that has seen it all has open what a fresh one has."""
    worn = scene.descriptors()
    scene.driver.stop()
    scene.driver.start()
    caller = Caller(scene.driver.socket, journal)
    caller.call("Probe", pb.ProbeRequest())
    fresh = scene.descriptors()
    caller.close()
    extra = [target for target in worn if target.startswith(str(scene.place.root)) and target not in fresh]
    if extra or len(worn) > len(fresh) + 4:
        journal.fault(f"the driver keeps {len(worn)} descriptors, a fresh one {len(fresh)}: {extra or worn}")


def main() -> int:
    arguments = parse_arguments()
    enter_own_namespace("tests.soak.run")
    with scratch(arguments.beneath) as place:
        scene = set_scene(place)
        volumes = make_volumes(place.root / "kubelet")
        scene.driver.start()
        try:
            free = scene.free_bytes()
            soak = Soak(scene, volumes, arguments)
            soak.run()
            end(scene, soak, volumes, free)
            compare_descriptors(scene, soak.journal)
        finally:
            scene.driver.stop()
        log = (place.root / "driver.log").read_text(encoding="utf-8", errors="replace")
        if "Traceback" in log:
            at = log.index("Traceback")
            soak.journal.fault(f"the driver's log has a traceback: {log[at - 300 : at + 1500]}")
        return report(soak, volumes, arguments)


def report(soak: Soak, volumes: list[Volume], arguments: argparse.Namespace) -> int:
    calls = sum(soak.journal.codes.values())
    lives, verified = sum(volume.lives for volume in volumes), sum(volume.verified for volume in volumes)
    lines = [
        f"soak: {arguments.clients} clients, {len(volumes)} volumes, {arguments.seconds:g} s, seed {arguments.seed}: "
        f"{calls} calls, {lives} lives, {verified} contents verified, {soak.kills} kills, "
        f"slowest start {max(soak.starts_s, default=0.0):.2f} s"
    ]
    lines += [
        f"  {method:<22} {code:<20} {count}" for (method, code), count in sorted(soak.journal.codes.items())
    ]
    lines += [f"FAULT {fault}" for fault in soak.journal.faults[:20]]
    lines.append(f"{len(soak.journal.faults)} faults")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if soak.journal.faults else 0


if __name__ == "__main__":
    sys.exit(main())
