# SPDX-License-Identifier: Apache-2.0
"""What the contracts of import-linter rest on. The contracts themselves are in pyproject.toml, run by `make check`."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "csi_driver"


def test_every_directory_of_modules_is_a_package() -> None:
    """import-linter does not see a directory without `__init__.py`: whatever lies there would keep every contract."""
    directories = {module.parent for module in PACKAGE.rglob("*.py")}

    assert [
        str(folder.relative_to(PACKAGE)) for folder in directories if not (folder / "__init__.py").is_file()
    ] == []
