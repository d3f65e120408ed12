# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: latency and throughput of the calls, as ratios to their floor, all measured in one run (root)."""

import argparse
import sys
from pathlib import Path

from bench.calls import measure_calls
from bench.contents import measure_contents
from bench.copies import measure_copies
from bench.isolation import enter_own_namespace
from bench.lifecycles import measure_memory, measure_throughput
from bench.many import measure_many
from bench.report import Report, machine
from bench.scratch import scratch
from bench.subjects import BACKENDS

SECTIONS = ("calls", "lives", "many", "memory", "copies", "contents")
OUTPUT = Path(__file__).parents[1] / ".cache" / "bench" / "bench.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds: a first look")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section (may be repeated)")
    parser.add_argument("--backend", choices=BACKENDS, help="this backend alone")
    parser.add_argument(
        "--beneath", type=Path, default=Path("/var/tmp"), help="where pools are made (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the machine-readable file (%(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    enter_own_namespace("bench")
    report = Report()
    share = 0.1 if arguments.quick else 1.0
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    sections = arguments.only or SECTIONS
    backend = arguments.backend
    if "calls" in sections:
        with scratch(arguments.beneath) as place:
            measure_calls(report, place, backend, rounds=int(300 * share))
    if "lives" in sections:
        with scratch(arguments.beneath) as place:
            measure_throughput(report, place, backend, seconds=max(1.0, 5 * share))
    if "many" in sections:
        with scratch(arguments.beneath) as place:
            measure_many(report, place, backend, kept=int(10_000 * share), rounds=int(300 * share))
    if "memory" in sections:
        with scratch(arguments.beneath) as place:
            measure_memory(report, place, backend, lives=int(10_000 * share))
    if "copies" in sections:
        with scratch(arguments.beneath) as place:
            measure_copies(report, place, rounds=max(5, int(50 * share)))
    if "contents" in sections:
        with scratch(arguments.beneath) as place:
            measure_contents(report, place, share)
    report.write(arguments.output)
    report.print_end(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
