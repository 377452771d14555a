"""The set-up script: telling whole packages from half-installed ones, showing progress, failing with a reason."""

import importlib.util
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def setup():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        spec = importlib.util.spec_from_file_location("kvmarket_setup_script", SCRIPTS / "setup.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("progress", None)


@pytest.fixture
def site_packages(tmp_path):
    """A real installed package, copied with its metadata."""
    for file in metadata.files("iniconfig"):
        target = tmp_path / file
        if ".." not in file.parts and file.locate().exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    return tmp_path


@pytest.fixture
def runner(setup, tmp_path):
    console = setup.Console(io.StringIO())
    console.beat_s = 0.1
    return setup.Runner(console, tmp_path / "log", tmp_path, limit_s=20.0)


def only(paths):
    (path,) = paths
    return path


def test_a_whole_package_is_not_damaged(setup, site_packages):
    assert setup.damaged(site_packages) == []


def test_rewritten_bytecode_is_no_damage(setup, site_packages):
    record = only(site_packages.glob("*.dist-info")) / "RECORD"
    (site_packages / "iniconfig/stale.pyc").write_bytes(b"1234")
    record.write_text(record.read_text() + "iniconfig/stale.pyc,sha256=x,3\n")
    assert setup.damaged(site_packages) == []


@pytest.mark.parametrize("damage", ["module gone", "module short", "no record", "no metadata", "binary record"])
def test_a_half_installed_package_is_found(setup, site_packages, damage):
    info = only(site_packages.glob("*.dist-info"))
    module = site_packages / "iniconfig/__init__.py"
    match damage:
        case "module gone":
            module.unlink()
        case "module short":
            module.write_bytes(module.read_bytes()[:-1])
        case "no record":
            (info / "RECORD").unlink()
        case "no metadata":
            (info / "METADATA").unlink()
        case "binary record":
            (info / "RECORD").write_bytes(b"\xff\xfe\0\x01")
    assert setup.damaged(site_packages) == [info]


def test_leftovers_of_a_removal_are_found_once(setup, site_packages):
    leftover = site_packages / "~niconfig-1.0.dist-info"
    leftover.mkdir()
    assert setup.damaged(site_packages) == [leftover]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"root": "/x"}', b"\xff"])
def test_a_damaged_stamp_means_nothing_is_finished(setup, tmp_path, content):
    (tmp_path / "kvmarket-setup.json").write_bytes(content)
    assert setup.Stamp.load(tmp_path) == setup.Stamp(root="", busy=True, lock="", project="")


def test_a_stamp_comes_back_as_saved(setup, tmp_path):
    stamp = setup.Stamp("/somewhere", busy=False, lock="a", project="b")
    stamp.save(tmp_path)
    assert setup.Stamp.load(tmp_path) == stamp


def test_a_silent_command_is_seen_to_go_on(runner):
    script = "import time; print('Collecting x', flush=True); time.sleep(0.6)"
    assert runner.run("it", [sys.executable, "-c", script]) == ["Collecting x"]
    beats = runner.console._stream.getvalue().splitlines()
    assert len(beats) >= 2
    assert beats[-1].endswith("Collecting x")


def test_a_failure_shows_the_commands_own_words_without_noise(setup, runner, tmp_path):
    script = (
        "import sys; print(\"WARNING: Location 'file:///a' is ignored: it is neither a file nor a directory.\");"
        "print('ERROR: the real reason', file=sys.stderr); sys.exit(3)"
    )
    with pytest.raises(setup.StepFailedError, match=r"it failed \(exit status 3\)") as caught:
        runner.run("it", [sys.executable, "-c", script])
    assert caught.value.output == ["ERROR: the real reason"]
    shown = setup.explain(caught.value, tmp_path / "log")
    assert shown[0] == "  | ERROR: the real reason"
    assert shown[-1] == "setup: it failed (exit status 3)"
    assert (tmp_path / "log").read_text() == "ERROR: the real reason\n"


def test_a_command_that_never_ends_is_stopped(setup, runner, tmp_path):
    runner.limit_s = 0.5
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(setup.StepFailedError, match="longer than"):
        runner.run("it", [sys.executable, "-c", script])
    assert time.monotonic() - began < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_packages_outside_the_environment_are_out_of_sight(runner, setup):
    environ = {"PYTHONPATH": "/elsewhere", "PIP_TARGET": "/elsewhere", "PIP_CACHE_DIR": "/cache"}
    cleaned = setup.Runner(runner.console, runner.log, runner.cwd, 1.0).environ
    assert "PYTHONPATH" not in cleaned
    progress = sys.modules[setup.Runner.__module__]
    assert progress.clean_environ(environ).items() >= {"PIP_CACHE_DIR": "/cache"}.items()
    assert not {"PYTHONPATH", "PIP_TARGET"} & progress.clean_environ(environ).keys()


def hold(directory, descriptor_ready):
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    descriptor_ready.set()
    time.sleep(60)


def test_a_second_set_up_waits_and_then_says_so(setup, runner, tmp_path):
    spawn = multiprocessing.get_context("fork")
    ready = spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path, ready), daemon=True)
    other.start()
    try:
        assert ready.wait(10)
        with pytest.raises(setup.SetupError, match="another set-up"), setup.exclusive(tmp_path, runner.console, 0.5):
            pass
    finally:
        other.kill()
        other.join(10)
    with setup.exclusive(tmp_path, runner.console, 5.0):  # its death released the lock
        pass
    assert "waiting for another set-up" in runner.console._stream.getvalue()


def test_torch_is_the_one_pin_installed_apart(setup, tmp_path):
    console = setup.Console(io.StringIO())
    it = setup.Setup(True, console, None, tmp_path, setup.Stamp(), setup.Stamp())
    torch, others = it.split_lock()
    lines = others.read_text().splitlines()
    assert torch.startswith("torch==")
    assert sorted([torch, *lines]) == sorted((setup.ROOT / setup.LOCK).read_text().split())


def test_an_old_python_is_told_what_to_do():
    script = (
        "import sys, runpy; sys.version_info = (3, 9, 0);"
        f"runpy.run_path({str(SCRIPTS / 'setup.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "make PYTHON=" in done.stderr


@pytest.mark.parametrize(
    ("said", "installed"),
    [
        ("", [".[dev,ucx]"]),
        ("ERROR: No matching distribution found for ucxx-cu12>=0.52; extra == 'ucx'", [".[dev,ucx]", ".[dev]"]),
        ("ERROR: No matching distribution found for numpy>=1.26", [".[dev,ucx]"]),
    ],
)
def test_only_a_missing_ucxx_is_done_without(setup, tmp_path, monkeypatch, said, installed):
    asked, shown = [], io.StringIO()

    def pip(_, *arguments):
        asked.append(arguments[-1])
        if said and "ucx" in arguments[-1]:
            raise setup.StepFailedError("pip install failed", [said])

    monkeypatch.setattr(setup.Setup, "pip", pip)
    goal = setup.Stamp(project="new")
    work = setup.Setup(
        vllm=False, console=setup.Console(shown), runner=None, venv=tmp_path, stamp=setup.Stamp(), goal=goal
    )
    if "numpy" in said:
        with pytest.raises(setup.StepFailedError):
            work.install_project()
    else:
        work.install_project()
        assert work.stamp.project == "new"
    assert asked == installed
    assert ("will be skipped" in shown.getvalue()) == ("ucxx" in said)
