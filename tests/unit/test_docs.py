# SPDX-License-Identifier: Apache-2.0
"""The documents tell what the code has: every key with its default, every parameter, every code, every option, every link."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from csi_driver import config, mutable
from csi_driver.app import parse_arguments
from csi_driver.backends import BACKENDS, btrfs, directory, image, memory, nfs, nfs_image
from csi_driver.backends.parameters import EVERY
from csi_driver.linux.filesystem import FILESYSTEMS
from csi_driver.model import PLACEMENT_KEYS, HealthStatus
from csi_driver.rpc.status import CODES
from csi_driver.subpath import VARIABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    DOCS.rglob("*.md")
)

TABLES: list[tuple[str, type[msgspec.Struct]]] = [
    ("The file", config._File),
    ("Every pool", config._Pool),
    ("`[pools.NAME.backing]`", config._Backing),
    ('`backend = "image"`', image.ImageOptions),
    ('`backend = "directory"`', directory._Options),
    ('`backend = "btrfs"`', btrfs._Options),
    ('`backend = "nfs"`', nfs._Options),
]


def section(document: str, heading: str) -> str:
    """The text beneath a heading of the second level."""
    found = re.search(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", (DOCS / document).read_text(), re.M | re.S
    )
    assert found, f"{document} has no section {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of its tables: the code in the first cell to the other cells."""
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {first.strip("`"): rest for first, *rest in cells}


@pytest.mark.parametrize(("heading", "kind"), TABLES, ids=[heading for heading, _ in TABLES])
def test_every_key_is_documented_with_its_default(heading: str, kind: type[msgspec.Struct]) -> None:
    documented = {
        key: msgspec.NODEFAULT if cells[1] == "required" else json.loads(cells[1].strip("`"))
        for key, cells in rows(section("configuration.md", heading)).items()
    }

    # Pools on exports have one section, whichever of two backends they get.
    kinds = (kind, nfs_image._Options) if kind is nfs._Options else (kind,)
    fields: dict[str, Any] = {}
    for field in (field for one in kinds for field in msgspec.structs.fields(one)):
        fields.setdefault(field.name, _default(field))
    assert documented == fields


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.required:
        return msgspec.NODEFAULT
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def test_every_backend_has_its_section_except_that_for_tests() -> None:
    text = (DOCS / "configuration.md").read_text()

    for name in BACKENDS:
        assert f'## `backend = "{name}"`' in text or name == "memory"
    assert memory.__doc__ is not None
    assert "never for data" in memory.__doc__


def test_the_examples_of_the_configuration_are_good() -> None:
    examples = re.findall(r"```toml\n(.*?)```", (DOCS / "configuration.md").read_text(), re.S)

    assert len(examples) == 3
    for example in examples:
        for pool in config.parse(example).pools.values():
            kinds: dict[str, type[msgspec.Struct]] = {
                "image": image.ImageOptions,
                "directory": directory._Options,
                "btrfs": btrfs._Options,
            }
            config.read_options(pool, kinds[pool.backend])


def test_every_option_of_serve_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], {})

    offered = set(re.findall(r"^\s+(--[a-z-]+)", capsys.readouterr().out, re.M))
    documented = {key.split()[0] for key in rows(section("configuration.md", "`orlop serve`"))}
    assert documented == offered


def test_every_parameter_is_documented() -> None:
    documented = rows(section("parameters.md", "StorageClass `parameters`")).keys()

    assert documented == {*PLACEMENT_KEYS, *EVERY}


def test_every_mutable_parameter_is_documented() -> None:
    assert tuple(rows(section("parameters.md", "VolumeAttributesClass"))) == mutable.KEYS


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_every_mkfs_option_is_documented(fs_type: str) -> None:
    line = next(
        line
        for line in (DOCS / "parameters.md").read_text().splitlines()
        if line.startswith(f"| {fs_type} |")
    )

    assert line.split("`")[1].split() == list(FILESYSTEMS[fs_type].options)


def test_every_variable_of_sub_path_is_documented() -> None:
    text = (DOCS / "parameters.md").read_text()

    assert [name for name in VARIABLES if f"`${{{name}}}`" not in text] == []


def test_every_code_is_documented() -> None:
    text = (DOCS / "errors.md").read_text()

    for code in CODES.values():
        assert f"| {code.name} |" in text
        assert f"\n## {code.name}\n" in text


def test_every_health_reason_is_documented() -> None:
    statuses = "|".join(HealthStatus)
    sources = "".join(
        path.read_text() for path in (ROOT / "csi_driver").rglob("*.py") if "pb" not in path.parts
    )
    reasons = set(re.findall(rf'HealthStatus\.(?:{statuses}), "(\w+)"', sources))
    documented = section("errors.md", "Health")

    assert len(reasons) > 5
    assert [reason for reason in reasons if f"`{reason}`" not in documented] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []
