# SPDX-License-Identifier: Apache-2.0
import pytest

from csi_driver.linux.mount import Attributes, parse_flags


@pytest.mark.parametrize(
    ("flags", "attributes", "rest"),
    [
        ([], Attributes(), []),
        (["defaults", "rw"], Attributes(), []),
        (["ro"], Attributes(readonly=True), []),
        (["nosuid", "nodev", "noexec"], Attributes(nosuid=True, nodev=True, noexec=True), []),
        (["nosuid,nodev", "discard"], Attributes(nosuid=True, nodev=True), ["discard"]),
        (["nosymfollow", "nodiratime"], Attributes(nosymfollow=True, nodiratime=True), []),
        (["ro", "rw"], Attributes(), []),
        (["nosuid", "suid"], Attributes(), []),
        (["noatime", "relatime"], Attributes(relatime=True), []),
        (["relatime", "strictatime"], Attributes(strictatime=True), []),
        (["barrier=1", "data=ordered"], Attributes(), ["barrier=1", "data=ordered"]),
        (["_netdev", "nofail", "x-systemd.automount", "comment=hi"], Attributes(), []),
        ([" noatime , ", ""], Attributes(noatime=True), []),
        (["sync", "lazytime"], Attributes(), ["sync", "lazytime"]),
    ],
)
def test_options_are_split_by_whom_they_belong_to(
    flags: list[str], attributes: Attributes, rest: list[str]
) -> None:
    assert parse_flags(flags) == (attributes, rest)


def test_commas_within_quotes_stay() -> None:
    label = 'context="system_u:object_r:container_file_t:s0:c1,c2"'

    assert parse_flags([f"ro,{label},noatime"]) == (Attributes(readonly=True, noatime=True), [label])


@pytest.mark.parametrize(
    "option", ["bind", "rbind", "remount", "move", "shared", "rprivate", "loop", "loop=/dev/loop3"]
)
def test_an_option_that_says_what_to_mount_is_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        parse_flags(["ro", option])


def test_more_attributes_cover_fewer() -> None:
    have = Attributes(readonly=True, nosuid=True, relatime=True)

    assert have.covers(Attributes(nosuid=True))
    assert have.covers(Attributes())
    assert not have.covers(Attributes(noexec=True))
