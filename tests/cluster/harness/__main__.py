# SPDX-License-Identifier: Apache-2.0
"""The command line of the cluster: tests/cluster/cluster --help."""

import argparse
import os
from pathlib import Path

from tests.cluster.harness import cluster, deploy, driver_image, layout, node, prerequisites, processes
from tests.cluster.harness.layout import Node


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/cluster/cluster", description="A Kubernetes on this machine."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("packages", help="install the Debian packages that are missing; the others do it too")
    verbs.add_parser("build", help="build programs and images into the cache (17 minutes on 2 cores, once)")
    verbs.add_parser("up", help="start it, or leave it as it is").add_argument(
        "nodes", type=int, nargs="?", default=1
    )
    verbs.add_parser("down", help="remove every process, mount, device, interface and file of it")
    verbs.add_parser("status", help="say how it is and how to use it")
    verbs.add_parser("logs", help="the end of every component's log")
    verbs.add_parser("deploy", help="build the driver's image, load it and install the chart")
    verbs.add_parser("image", help="build the driver's image into the cache, for another day").add_argument(
        "name"
    )
    verbs.add_parser("load", help="load image archives").add_argument("archive", type=Path, nargs="+")
    verbs.add_parser("power-cut", help="cut a node's power and start it again").add_argument("node", type=int)
    verbs.add_parser(
        "stop", help="end pods and control plane, but not what is mounted (minikube's none driver)"
    )
    verbs.add_parser("start", help="start what `stop` ended")
    execute = verbs.add_parser("node-exec", help="run a command in a node's namespaces")
    execute.add_argument("node", type=int)
    execute.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    match arguments.verb:
        case "packages":
            prerequisites.check()
        case "build":
            cluster.build()
        case "up":
            cluster.up(arguments.nodes)
        case "down":
            cluster.down()
        case "status":
            up = cluster.is_up(len(layout.existing_nodes()))
            print(cluster.usage() if up else "the cluster is not up")
        case "logs":
            print(cluster.tails(lines=40))
        case "deploy":
            deploy.deploy()
        case "image":
            driver_image.build(arguments.name)
        case "load":
            cluster.load(arguments.archive)
        case "power-cut":
            cluster.power_cut(Node(arguments.node))
        case "stop":
            cluster.stop()
        case "start":
            cluster.start_again()
        case "node-exec":
            command = [*node.enter(Node(arguments.node)), *arguments.command]
            os.execvpe(command[0], command, processes.environment())


main()
