"""Run the tests over RDMA on a machine without an RDMA device: in a guest whose kernel makes one of software.

    .venv/bin/python scripts/verbs_guest/run.py [pytest options]

QEMU boots Debian's kernel on the files of this very machine, read-only; soft-RoCE (rxe) gives it a device with real
ibverbs. The first run fetches about 160 MB of packages and keeps what it makes of them in .verbs-guest. The last line
is the test runner's own, and its status is the exit status; 2 says that the guest could not be made or run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from parts import MissingError, build

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent.parent
CACHE = ROOT / ".verbs-guest"
LIMIT_S = 1800.0
MEMORY = "4G"
BOOT_S = 60.0
BOOTED, STATUS = "verbs-guest: booted", "verbs-guest: status "
EMULATED = "tcg,thread=multi"
FAILED = 2


def made(cache: Path) -> Path:
    """Return the guest's parts, made on first use and again when their recipe has changed."""
    recipe = hashlib.sha256((SCRIPTS / "parts.py").read_bytes() + (SCRIPTS / "init.sh").read_bytes()).hexdigest()
    stamp = cache / "recipe"
    if not stamp.exists() or stamp.read_text() != recipe:
        print("verbs-guest: fetching and unpacking its parts", flush=True)
        build(cache, SCRIPTS)
        stamp.write_text(recipe)
    return cache


def write_settings(guest: Path, ucx: Path, python: str, pytest_args: list[str]) -> None:
    """Leave for the guest what it is to run."""
    top = guest / "kvmarket-verbs"
    top.mkdir(exist_ok=True)
    shutil.copy2(SCRIPTS / "tests.sh", top / "tests.sh")
    settings = {
        "VERBS_ROOT": str(ROOT),
        "VERBS_PYTHON": python,
        "VERBS_UCX": str(ucx),
        "VERBS_PYTEST_ARGS": shlex.join(pytest_args),
    }
    (top / "settings").write_text("".join(f"export {name}={shlex.quote(text)}\n" for name, text in settings.items()))


def qemu_command(cache: Path, accelerator: str) -> tuple[list[str], dict[str, str]]:
    """Return QEMU's command line and environment.

    Raises:
        MissingError: there is no QEMU.
    """
    host = cache / "host"
    name = "qemu-system-x86_64"
    program = shutil.which(name) or shutil.which(name, path=str(host / "usr/bin"))
    if program is None:
        raise MissingError(f"there is no {name}, and its package brought none")
    command = [program, "-machine", "q35", "-accel", accelerator, "-cpu", "max"]
    command += ["-smp", str(min(4, os.cpu_count() or 1)), "-m", MEMORY, "-nographic", "-no-reboot", "-nic", "none"]
    for directory in ("usr/share/qemu", "usr/share/seabios"):
        command += ["-L", str(host / directory)] if (host / directory).is_dir() else []
    for tag, path in (("host", Path("/")), ("guest", cache / "guest")):
        command += ["-fsdev", f"local,id={tag},path={path},security_model=none,readonly=on,multidevs=remap"]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    command += ["-kernel", str(cache / "vmlinuz"), "-initrd", str(cache / "initrd.cpio")]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    libraries = [str(path) for path in (host / "usr/lib/x86_64-linux-gnu", host / "usr/lib") if path.is_dir()]
    return command, {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}


def run_guest(command: list[str], environ: dict[str, str]) -> int | None:
    """Run the guest, print what it says, and return its tests' status; None if it did not boot.

    Raises:
        MissingError: it ended, or had to be ended, without a status.
    """
    process = subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    timers = [threading.Timer(BOOT_S, process.kill), threading.Timer(LIMIT_S, process.kill)]
    booted, status, last = False, None, ""
    try:
        for timer in timers:
            timer.start()
        for raw in process.stdout or ():
            line = raw.decode(errors="replace").rstrip()
            if line.endswith(BOOTED):  # the firmware leaves the cursor anywhere
                booted = True
                timers[0].cancel()
            elif line.startswith(STATUS):
                status = int(line.removeprefix(STATUS))
            elif booted and status is None:
                print(line, flush=True)
            last = line or last
    finally:
        for timer in timers:
            timer.cancel()
        process.kill()
        process.wait()
    if booted and status is None:
        raise MissingError(f"the guest ended, or was ended after {LIMIT_S:g} s, without a status")
    if not booted:
        print(f"verbs-guest: no boot with {command[command.index('-accel') + 1]}: {last[-200:]}", flush=True)
    return status


def run_tests(cache: Path) -> int:
    """Run the guest, by the processor itself where that works (it may be there and not work), else emulated.

    Raises:
        MissingError: it runs neither way.
    """
    for accelerator in ("kvm", EMULATED):
        if accelerator != "kvm" or os.access("/dev/kvm", os.R_OK | os.W_OK):
            status = run_guest(*qemu_command(cache, accelerator))
            if status is not None:
                return status
    raise MissingError("the guest does not boot")


def interrupt(_number: int, _frame: object) -> None:
    """Take termination as Ctrl-C, so that QEMU is ended too."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Make the guest if need be, and run the tests in it."""
    parser = argparse.ArgumentParser(description="Run the tests over RDMA in a QEMU guest with soft-RoCE.")
    parser.add_argument("--python", default=sys.executable, help="the interpreter with kvmarket's tests and ucxx")
    options, pytest_args = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        cache = made(CACHE)
        write_settings(cache / "guest", cache / "ucx", options.python, pytest_args)
        return run_tests(cache)
    except (MissingError, OSError) as error:
        print(f"verbs-guest: {error}", flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("verbs-guest: interrupted", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
