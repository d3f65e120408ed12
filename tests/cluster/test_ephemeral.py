# SPDX-License-Identifier: Apache-2.0
"""Volumes that live as long as their pod."""

from tests.cluster import kube, traces
from tests.cluster.kube import Namespace


def test_an_inline_volume_is_as_large_as_it_says_and_goes_with_its_pod(namespace: Namespace) -> None:
    before = traces.of_all_nodes()
    namespace.apply_example("inline-ephemeral.yaml")
    namespace.wait_until_running("scratch")
    assert any(trace not in before and "home" in trace for trace in traces.of_all_nodes())

    namespace.shell("scratch", "dd if=/dev/zero of=/scratch/file bs=1M count=40")
    refused = namespace.refusal("scratch", "dd if=/dev/zero of=/scratch/more bs=1M count=40")

    assert "No space left on device" in refused
    namespace.delete("pod", "scratch")
    kube.wait_until(lambda: traces.of_all_nodes() <= before, "the volume to be gone with its pod")


def test_a_generic_ephemeral_volume_is_a_claim_that_goes_with_its_pod(namespace: Namespace) -> None:
    namespace.apply_example("generic-ephemeral.yaml")
    namespace.wait_until_running("generic")
    volume = namespace.volume_of("generic-scratch")["metadata"]["name"]
    namespace.shell("generic", "echo here > /scratch/file")

    namespace.delete("pod", "generic")

    kube.wait_until(
        lambda: not namespace.exists("persistentvolumeclaim", "generic-scratch"), "the claim to go"
    )
    kube.wait_until(lambda: not namespace.exists("persistentvolume", volume), "the volume to go")
