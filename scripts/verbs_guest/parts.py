"""What the guest is made of: Debian packages, unpacked and not installed, and a UCX that has verbs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

UCX_WHEEL = "nixl-cu12==1.5.1"
"""Its UCX has verbs, which those of ucxx's wheels have not; it is needed for nothing else here."""
ON_HOST = ("qemu-system-x86",)
IN_GUEST = ("ibverbs-providers", "ibverbs-utils")
ALWAYS = ("busybox-static", "iproute2")
KERNEL = "linux-image-amd64"
MODULES = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "dummy", "crc32_generic", "rdma_ucm", "ib_uverbs", "rdma_rxe",
)  # fmt: skip
"""Loaded with those that they need."""
COMMAND_S = 600.0


class MissingError(Exception):
    """The guest cannot be made or run here; the message names what is missing."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        MissingError: it is not installed, failed, or did not end.
    """
    name = Path(command[0]).name
    if shutil.which(str(command[0])) is None:
        raise MissingError(f"{name} is not installed (this takes Debian or a descendant of it, on x86-64)")
    try:
        done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=COMMAND_S)
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{name} did not end in {COMMAND_S:g} s") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise MissingError(f"failed with status {done.returncode}: {shlex.join(map(str, command))[:200]}\n{last}")
    return done.stdout


def absent(names: Sequence[str]) -> list[str]:
    """Return those of the packages and their dependencies that are not installed here."""
    said = run("apt-get", "--simulate", "--no-install-recommends", "install", *names)
    return re.findall(r"^Inst (\S+)", said, re.MULTILINE)


def download(names: Sequence[str], into: Path) -> list[Path]:
    """Fetch packages, without installing them.

    Raises:
        MissingError: no network, or no such package in the lists that ``apt-get update`` got.
    """
    into.mkdir(parents=True)
    try:
        run("apt-get", "download", *names, cwd=into)
    except MissingError as error:
        raise MissingError(f"packages cannot be fetched (is there a network? try apt-get update): {error}") from error
    return sorted(into.glob("*.deb"))


def unpack(packages: Sequence[Path], into: Path) -> None:
    """Unpack packages into a tree whose top is laid out as Debian's: ``/lib`` and the like are links into ``/usr``."""
    into.mkdir()
    for package in packages:
        run("dpkg-deb", "--extract", package, into)
    for name in ("bin", "sbin", "lib", "lib64"):
        if (into / name).is_dir():
            shutil.copytree(into / name, into / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(into / name)
        (into / name).symlink_to(f"usr/{name}")


def unpack_ucx(into: Path) -> None:
    """Lay out the wheel's UCX under the names that the loader looks for, over the system's libibverbs."""
    fetched = into / "wheel"
    try:
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-input", "--no-deps", "--only-binary=:all:")
        run(*pip, "-d", fetched, UCX_WHEEL)
    except MissingError as error:
        raise MissingError(f"no UCX with verbs: {UCX_WHEEL} cannot be fetched: {error}") from error
    private = re.compile(r"[^/]+\.libs/(ucx/)?lib(uc[a-z_0-9]+|ibverbs|mlx5|nl-[a-z0-9-]+|numa)[-.][^/]*")
    with zipfile.ZipFile(next(fetched.glob("*.whl"))) as wheel:
        for name in filter(private.fullmatch, wheel.namelist()):
            path = into / name.partition("/")[2]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(wheel.read(name))
    shutil.rmtree(fetched)
    system = Path("/usr/lib/x86_64-linux-gnu")
    for path in list(into.rglob("*.so*")):
        stem = re.split(r"-[0-9a-f]{8}\.|\.so", path.name)[0]
        if stem in {"libibverbs", "libmlx5"}:  # the system's know where their drivers are
            path.unlink()
            path.symlink_to(system / f"{stem}.so.1")
        elif stem.startswith(("libuc", "libuct")):
            for suffix in (".so", ".so.0", ".so.0.0.0"):
                link = path.parent / f"{stem}{suffix}"
                if not link.exists():
                    link.symlink_to(path.name)


def load_order(kernel: Path) -> list[Path]:
    """Return the files of `MODULES` and of those that they need, these first.

    Raises:
        MissingError: the kernel has no such module.
    """
    files = {path.name.removesuffix(".ko").replace("-", "_"): path for path in kernel.rglob("*.ko")}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name not in files:
            raise MissingError(f"the kernel package has no module {name}")
        if name not in order:
            needs = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
            for need in needs.group(1).decode().split(",") if needs and needs.group(1) else ():
                add(need.replace("-", "_"))
            order[name] = files[name]

    for name in MODULES:
        add(name)
    return list(order.values())


def make_initrd(kernel: Path, busybox: Path, init: Path, initrd: Path) -> None:
    """Pack busybox, the modules and `init`."""
    top = initrd.parent / "initrd"
    (top / "bin").mkdir(parents=True)
    (top / "modules").mkdir()
    shutil.copy2(busybox, top / "bin" / "busybox")
    shutil.copy2(init, top / "init")
    (top / "init").chmod(0o755)
    order = load_order(kernel)
    for path in order:
        shutil.copy2(path, top / "modules" / path.name)
    (top / "modules" / "order").write_text("".join(f"{path.name}\n" for path in order))
    names = "".join(f"{path.relative_to(top)}\n" for path in sorted(top.rglob("*")))
    with initrd.open("wb") as file:
        pack = [str(busybox), "cpio", "-o", "-H", "newc"]
        subprocess.run(pack, cwd=top, input=names.encode(), stdout=file, stderr=subprocess.DEVNULL, check=True)


def build(cache: Path, scripts: Path) -> None:
    """Make everything in `cache`, beside what is there, and put it in place only when it is whole.

    Raises:
        MissingError: something that it takes is not here.
    """
    temporary = cache.with_name(f"{cache.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        depends = run("apt-cache", "depends", "--important", KERNEL)
        image = re.search(r"linux-image-\S+", depends.partition("\n")[2])
        if image is None:
            raise MissingError(f"apt knows no kernel behind {KERNEL}: run apt-get update")
        packages = temporary / "packages"
        unpack(download(absent(ON_HOST), packages / "host") if absent(ON_HOST) else [], temporary / "host")
        unpack(download([*ALWAYS, *absent([*IN_GUEST, *ALWAYS])], packages / "guest"), temporary / "guest")
        unpack(download([image.group()], packages / "kernel"), temporary / "kernel")
        busybox = temporary / "guest/bin/busybox"
        make_initrd(temporary / "kernel", busybox, scripts / "init.sh", temporary / "initrd.cpio")
        shutil.copy2(next((temporary / "kernel/boot").glob("vmlinuz*")), temporary / "vmlinuz")
        unpack_ucx(temporary / "ucx")
        for done in (packages, temporary / "kernel", temporary / "initrd"):
            shutil.rmtree(done)
        shutil.rmtree(cache, ignore_errors=True)
        temporary.rename(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
