# SPDX-License-Identifier: Apache-2.0
"""`orlop`: `serve` is dispatched here, before anything that only the other commands need is loaded."""

import sys


def main() -> None:
    """The command `orlop`."""
    if sys.argv[1:2] == ["serve"]:
        from csi_driver.app import serve

        sys.exit(serve(sys.argv[2:]))
    from csi_driver.cli.main import main as cli

    cli()


if __name__ == "__main__":
    main()
