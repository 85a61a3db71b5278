"""What the wheel holds, who imports whom, and what the command line loads before it is needed."""

import ast
import importlib.util
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("models", "calib", "eval")
MEET_ALL = ("cli", "demo", "pipeline")  # the only modules of the core that may import wings, by how their names begin
HEAVY = ("jax", "flax", "optax", "orbax", "transformers", "torch", "tensorflow_datasets", "matplotlib", "scipy", "PIL")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def code_folders() -> set[str]:
    """Folders that hold modules, links not followed."""
    found = set()
    for file in ROOT.glob("*/**/*.py"):
        parts = file.relative_to(ROOT).parts[:-1]
        hidden = parts[0].startswith(".") or parts[0] in ("tests", "build", "dist", "benchmarks")
        linked = any(ROOT.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))
        if not hidden and not linked and "site-packages" not in parts:
            found.add("/".join(parts))
    return found


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth; ``from a import b`` gives ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import; name the module in full"
            names |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
    return names


def wings_of(names: set[str]) -> set[str]:
    return {w for w in WINGS for n in names if n == f"splitq_jax.{w}" or n.startswith(f"splitq_jax.{w}.")}


def test_every_folder_with_code_is_a_package() -> None:
    """A package that is not listed is silently missing from the wheel."""
    setuptools = SETTINGS["tool"]["setuptools"]
    assert set(setuptools["package-dir"].values()) == code_folders()
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    for wing in WINGS:
        assert (ROOT / "splitq_jax" / wing).is_symlink() and (ROOT / wing / "__init__.py").is_file()


@pytest.mark.parametrize("wing", WINGS)
def test_wings_never_import_each_other(wing: str) -> None:
    files = list((ROOT / wing).rglob("*.py"))
    assert files
    for file in files:
        names = imports(file)
        assert wings_of(names) <= {wing}, file
        assert not any(
            n.startswith(("splitq_jax.cli", "splitq_jax.commands", "splitq_jax.demo", "splitq_jax.pipeline")) for n in names
        ), file


def test_the_core_imports_no_wing() -> None:
    for file in (ROOT / "splitq_jax").glob("*.py"):
        if not file.stem.startswith(MEET_ALL):
            assert not wings_of(imports(file)), file


@pytest.mark.slow
def test_the_wheel_holds_only_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "splitq-demo")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(source)]
    if importlib.util.find_spec("setuptools"):  # without it pip fetches one, which needs a network
        command.insert(-1, "--no-build-isolation")
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"splitq_jax"}
    expected = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items()
        for file in (ROOT / folder).glob("*.py")
    }
    assert expected == {n for n in names if n.endswith(".py")}
    assert "splitq_jax/py.typed" in names


@pytest.mark.skipif(not (ROOT / "splitq_jax" / "cli.py").is_file(), reason="no command line yet")
def test_help_loads_nothing_heavy() -> None:
    """`splitq --help` takes under a second because nothing heavy is imported; loads, unlike seconds, are the same everywhere."""
    code = f"""
import sys
sys.argv = ["splitq", "--help"]
from splitq_jax.cli import main
try:
    code = main()
except SystemExit as e:
    code = e.code
assert not code, code
loaded = sorted({{m.split(".")[0] for m in sys.modules}} & set({HEAVY!r}))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_freed_memory_is_kept():
    """What is allocated again comes from the process, not page by page from the system."""
    code = """
import resource, numpy
from splitq_jax.pipeline import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(1 << 23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = [faults() for _ in range(3)][-1]
keep_freed_memory()
print(anew, [faults() for _ in range(3)][-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    anew, kept = map(int, done.stdout.split())
    assert kept < anew / 4
