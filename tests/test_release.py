"""The release: its parts agree; wheel and source archive work where nothing else of ours is installed."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_compress


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_version_and_citation_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == hf_compress.__version__
    assert cited["license"] in (ROOT / "setup.cfg").read_text()
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    released = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released.groups() == (cited["version"], cited["date-released"])


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder with both archives; the wheel is built from the unpacked source archive."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # The requirements of the build are here already: no network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return out


@pytest.mark.slow
def test_the_archives_hold_what_they_should(release):
    (source,) = release.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "hf_compress", "docs", "examples", "tests", cwd=ROOT).splitlines()
    assert len(tracked) > 300
    assert [name for name in tracked if name not in names] == []
    assert {"CITATION.cff", "CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "setup.cfg"} <= names
    (wheel,) = release.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in tracked if name.startswith("hf_compress/")}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Gives (the interpreter of an environment that an archive was installed into, its folder of packages).

    What the package requires is seen through a path file, which makes no package of ours visible; `make dist` installs
    all of it from the registry.
    """

    def installed(archive):
        folder = tmp_path_factory.mktemp("env")
        venv.create(folder, with_pip=False)
        python = str(folder / "bin" / "python")
        packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(packages, "others.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", python, "install"]
        run(*pip, "--no-deps", "--no-index", "--no-build-isolation", str(archive), env=ENVIRONMENT, cwd=folder)
        return python, packages

    return installed


@pytest.mark.slow
def test_a_wheel_works_where_nothing_else_of_ours_is(release, fresh, tmp_path):
    python, packages = fresh(*release.glob("*.whl"))
    program = str(ROOT / "tests" / "release_program.py")
    said = run(python, "-I", program, str(tmp_path / "work"), env=ENVIRONMENT, cwd=tmp_path)
    assert said.splitlines()[-1].endswith(f"works from {packages}/hf_compress")


@pytest.mark.slow
def test_a_source_archive_installs(release, fresh, tmp_path):
    python, packages = fresh(*release.glob("*.tar.gz"))
    script = Path(python).with_name("hf-compress")
    assert run(str(script), "--version", env=ENVIRONMENT) == f"hf-compress {hf_compress.__version__}\n"
    place = run(python, "-I", "-c", "import hf_compress; print(hf_compress.__file__)", env=ENVIRONMENT, cwd=tmp_path)
    assert Path(place.strip()).parent == Path(packages, "hf_compress")
