# SPDX-License-Identifier: Apache-2.0
"""What volumes leave on a node: homes in the pools, loop devices, mounts, directories of kubelet."""

from tests.cluster.harness import layout, node
from tests.cluster.harness.layout import Node

# One shell for all questions: entering a node costs more than asking.
_LOOK = r"""
for pool in /var/lib/orlop/* /data/team; do
    for home in "$pool"/volumes/* "$pool"/snapshots/* "$pool"/staging/* "$pool"/trash/*; do
        [ -e "$home" ] && echo "home $home"
    done
done
grep -ho '[^ ]*/kubernetes.io[^ ]*csi[^ ]*' /proc/self/mountinfo | sed 's/^/mount /'
# A loop device belongs to the node on whose disk its file lies: its path is lost when its driver's container ends.
disk=$(mountpoint --fs-devno /var/lib/orlop/fast)
losetup --list --noheadings --raw --output NAME,BACK-MAJ:MIN | while read -r name device; do
    [ "$device" = "$disk" ] && echo "loop $name"
done
exit 0
"""


def of_all_nodes() -> set[str]:
    return {f"{one.name}: {trace}" for one in layout.existing_nodes() for trace in of(one)}


def of(one: Node) -> set[str]:
    return set(node.execute(one, "sh", "-c", _LOOK).splitlines())
