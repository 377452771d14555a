"""What a wheel of the project puts on an import path."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


def test_import_roots_are_the_packages_themselves(names):
    # `adapters` must not be among them: a distribution of that name exists, and ours would shadow it
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    expected = {Path(package).name for package in packages}
    roots = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert roots == expected
    assert expected >= {"kvmarket", "kvmarket_vllm"}


def test_every_package_in_the_tree_is_listed(names):
    on_disk = {path.parent.name for path in (ROOT / "adapters").glob("*/__init__.py")}
    assert on_disk <= {name.parts[0] for name in names}
    assert not (ROOT / "adapters/__init__.py").exists()


def test_every_module_is_in_it(names):
    modules = {path.relative_to(ROOT) for path in (ROOT / "kvmarket").rglob("*.py")}
    assert modules
    assert modules <= {Path(name) for name in names}
