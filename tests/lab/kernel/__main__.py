# SPDX-License-Identifier: Apache-2.0
"""The command line of the second kernel: tests/lab/run --help."""

import argparse
import os
import sys
from pathlib import Path

from tests.lab.kernel import machine, packages, qemu, uml
from tests.lab.kernel.machine import Job


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/lab/run",
        description="Run a command under a throw-away Linux kernel that has what this machine's may lack (NFS, project "
        "quotas). It sees this machine's files copy-on-write: what it changes is thrown away.",
        epilog="Exit status: the command's; 124 if it ran out of time, 125 if the kernel itself failed.",
    )
    parser.add_argument("--kernel", choices=("uml", "qemu"), default=os.environ.get("LAB_KERNEL"))
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS")
    parser.add_argument("--writable", action="append", type=Path, default=[], metavar="DIRECTORY")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the kernel's own log here")
    parser.add_argument(
        "--or-skip", action="store_true", help="succeed, saying why, where the kernel cannot be had"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="default: a shell")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    kernel = arguments.kernel or uml.or_else_qemu()
    problem = packages.ensure(kernel) or (qemu.ensure_kernel() if kernel == "qemu" else "")
    if problem:
        print(f"lab: {problem}", file=sys.stderr)
        if not arguments.or_skip or os.environ.get("CI") == "true":
            return machine.BROKEN
        print("lab: skipped (with CI=true this would be a failure)", file=sys.stderr)
        return 0
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    job = Job(
        command=command or ["bash"],
        interactive=not command and sys.stdin.isatty(),
        memory=arguments.memory,
        writable=[path.resolve() for path in arguments.writable],
    )
    return machine.run(qemu.argv if kernel == "qemu" else uml.argv, job, arguments.timeout, arguments.log)


if __name__ == "__main__":
    sys.exit(main())
