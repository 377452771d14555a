"""How fast does UCX carry pages between processes, beside memcpy and beside NIXL on the same UCX lanes?

Every figure is a ratio to one thread's memcpy of as many bytes, taken in the same rounds: 1.0 is as fast as memcpy. It
copies from a pool as large and as warm as the owner's to one like ours; blocks come from the same random places, and go
to consecutive ones, which is the most that one call of numpy can do.

    kvmarket  `Connection.read` of the `ucx` transport: generations checked before and after, as every fetch does
    kernel    the system call behind CMA lanes alone, given ready-made lists of the same pages: no checks, no Python;
              what any CMA reader is bound by (`..._to_kernel` is our share of it)
    kvmarket_shared   the same as kvmarket, shared by two threads (fetches over CMA use one: this is why)
    nixl      NIXL's READ of prepared descriptor lists, its owner calling it only while it is read
    nixl_progress_thread   the same, both sides with NIXL's progress thread, in rounds of its own, for it spins

Cases: 64 MiB in one piece; 1,000 blocks of 32 KiB from random places of a 128 MiB pool to random places of another;
4 KiB for the latency (microseconds, not a ratio). Lanes: what UCX takes within one host (shared memory and
CMA), and TCP over loopback. Memory is private, on huge pages, on both sides. Idle CPU is that of both processes
together, connected, as a share of one core. `..._cpu` is what a read costs this process, all threads, in units of
memcpy's time; over CMA it costs the owner nothing.

With --peer nixl an environment for it is made in .venv-nixl (nixl-cu12, 270 MB), over the packages of this one.
Aims, on CMA: contiguous 0.9 and NIXL's; blocks 0.7 and 1.3 of NIXL's; 4 KiB in 100 us. On TCP: 2 of NIXL's.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, interleave, log, timed

from kvmarket.announced import NO_DIGEST, Announced
from kvmarket.deadline import Deadline
from kvmarket.helper import Helper
from kvmarket.identity import OwnerInfo
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.memory import private_huge_pages
from kvmarket.region.pages import PagedMemory, PageLayout
from kvmarket.region.region import LentRegion
from kvmarket.registry.records import make_records
from kvmarket.shared_read import SharedRead
from kvmarket.transport import ReadRequest
from kvmarket.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection as Pipe

ROOT = Path(__file__).resolve().parents[1]
NIXL = "nixl-cu12==1.5.1"
POOL_BYTES = 128 << 20
PAGE_BYTES = {"contiguous": 2 << 20, "blocks": 32 << 10, "latency": 4 << 10}
PAGES = {"contiguous": 32, "blocks": 1000, "latency": 1}
READS_PER_LATENCY = 200
LANES = {"cma": "", "tcp": "tcp"}
ROUNDS, QUICK_ROUNDS = 15, 2
START_S = 120.0
IDLE_S = 2.0
process_vm_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
process_vm_readv.restype = ctypes.c_ssize_t
process_vm_readv.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)


def _pages(case: str, seed: int) -> np.ndarray:
    if case == "blocks":
        return np.random.default_rng(seed).permutation(POOL_BYTES // PAGE_BYTES[case])[: PAGES[case]]
    return np.arange(PAGES[case])


def own(pipe: Pipe, lanes: str) -> None:
    """Lend one pool as regions of every page size, until told to stop; a process of its own."""
    _choose(lanes)
    from kvmarket.transport.ucx import UcxTransport

    transport, incarnation = UcxTransport(os.environ, addresses=("127.0.0.1",)), os.urandom(16)
    endpoints = {transport.scheme: transport.serve(incarnation)}
    memory = private_huge_pages(POOL_BYTES)  # as NIXL's target has it
    memory[:] = np.frombuffer(np.random.default_rng(9).bytes(POOL_BYTES), np.uint8)
    regions = {}
    for number, (case, page_bytes) in enumerate(PAGE_BYTES.items()):
        pages = PagedMemory(PageLayout.packed(POOL_BYTES // page_bytes, page_bytes), (memory,))
        regions[case] = LentRegion(number, incarnation, pages, [], bytes(16))
        transport.lend(regions[case])
    told = {
        case: (region.describe(endpoints).to_wire(), region.generations.validate(_pages(case, 8)))
        for case, region in regions.items()
    }
    pipe.send((incarnation, told, memory.ctypes.data))
    while pipe.recv() == "cpu":
        pipe.send(time.process_time())
    transport.stop_serving()
    for region in regions.values():
        region.close()
    transport.close()


def _choose(lanes: str) -> None:
    os.environ.pop("UCX_TLS", None)
    if LANES[lanes]:
        os.environ["UCX_TLS"] = LANES[lanes]


class Ours:
    """A reader of this process and its owner in another."""

    def __init__(self, lanes: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=own, args=(theirs, lanes), daemon=True)
        self._process.start()
        if not self._pipe.poll(START_S):
            raise SystemExit("the owner did not start")
        incarnation, told, self._there = self._pipe.recv()
        _choose(lanes)
        from kvmarket.transport.ucx import UcxTransport

        self._transport = UcxTransport(os.environ, cma_readers=2)
        owner = OwnerInfo(1, incarnation, self._process.pid or 0, 0, "", "bench")
        self._pool = private_huge_pages(POOL_BYTES)
        self._reads = {}
        for case, (wire, generations) in told.items():
            connection = self._transport.connect(owner, RegionDescriptor.from_wire(wire))
            local = PagedMemory(PageLayout.packed(POOL_BYTES // PAGE_BYTES[case], PAGE_BYTES[case]), (self._pool,))
            self._reads[case] = connection, ReadRequest(_pages(case, 8), generations, local, _pages(case, 10))
            self.path = connection.path
        self._helper = Helper()
        connection, request = self._reads["contiguous"]
        self.shares = self._helper.useful and connection.readers(request.local) > 1

    def run(self, case: str) -> float:
        connection, request = self._reads[case]
        seconds = []
        for _ in range(READS_PER_LATENCY if case == "latency" else 1):
            began = time.perf_counter()
            report = connection.read(request, deadline=Deadline(30.0))
            seconds.append(time.perf_counter() - began)
            if report.pages != PAGES[case]:
                raise SystemExit(f"only {report.pages} pages came: {report.refused}")
        return statistics.median(seconds)

    def run_shared(self, case: str) -> float:
        """Read in parts, with a second thread."""
        connection, request = self._reads[case]
        count = len(request.pages)
        records = make_records(1, 0, request.pages, request.generations, [NO_DIGEST] * count)
        unverified = Verification("none", Announced.of(records), request.local, request.local_pages)
        began = time.perf_counter()
        report = SharedRead(connection, request, Deadline(30.0), unverified).run(self._helper)
        seconds = time.perf_counter() - began
        if report.pages != count:
            raise SystemExit(f"only {report.pages} pages came: {report.refused}")
        return seconds

    def run_kernel(self, case: str) -> float:
        """Read the same pages by the system call alone."""
        lists = [
            np.stack([start + pages * PAGE_BYTES[case], np.full(len(pages), PAGE_BYTES[case])], axis=1).astype(
                np.uint64
            )
            for start, pages in ((self._pool.ctypes.data, _pages(case, 10)), (self._there, _pages(case, 8)))
        ]
        pid, total = self._process.pid or 0, PAGES[case] * PAGE_BYTES[case]
        (here, there), count = (entries.ctypes.data for entries in lists), PAGES[case]
        seconds = []
        for _ in range(READS_PER_LATENCY if case == "latency" else 1):
            began = time.perf_counter()
            copied = process_vm_readv(pid, here, count, there, count, 0)
            seconds.append(time.perf_counter() - began)
            if copied != total:
                raise SystemExit(f"the kernel copied {copied} bytes of {total}")
        return statistics.median(seconds)

    def clear(self) -> None:
        """Forget what was read."""
        self._pool[:] = 0

    def right(self) -> bool:
        """Tell whether the blocks read last are the owner's."""
        data = np.frombuffer(np.random.default_rng(9).bytes(POOL_BYTES), np.uint8).reshape(-1, PAGE_BYTES["blocks"])
        mine = self._pool[:POOL_BYTES].reshape(data.shape)
        return bool((mine[_pages("blocks", 10)] == data[_pages("blocks", 8)]).all())

    def idle(self) -> float:
        self._pipe.send("cpu")
        before = self._pipe.recv() + time.process_time()
        time.sleep(IDLE_S)
        self._pipe.send("cpu")
        return float(self._pipe.recv() + time.process_time() - before) / IDLE_S

    def close(self) -> None:
        self._helper.close()
        self._transport.close()
        self._pipe.send("stop")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


class PoolMemcpy:
    """One thread copying between two private pools, as large as those that are read from and to."""

    def __init__(self) -> None:
        self._source, self._target = private_huge_pages(POOL_BYTES), private_huge_pages(POOL_BYTES)
        self._source[:] = np.frombuffer(np.random.default_rng(7).bytes(POOL_BYTES), np.uint8)

    def operation(self, case: str) -> Callable[[], float]:
        """Return what copies as many bytes as a case reads."""
        shape = (POOL_BYTES // PAGE_BYTES[case], PAGE_BYTES[case])
        source, target = self._source.reshape(shape), self._target.reshape(shape)[: PAGES[case]]
        if case == "blocks":
            return timed(lambda: np.take(source, _pages(case, 8), axis=0, out=target, mode="clip"))
        return timed(lambda: np.copyto(target, source[: PAGES[case]]))


class Nixl:
    """NIXL's two processes, see nixl_peer.py."""

    def __init__(self, python: Path, lanes: str, *, progress_thread: bool) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        environ |= {"PYTHONPATH": str(ROOT), "UCX_NET_DEVICES": "lo"} if LANES[lanes] else {"PYTHONPATH": str(ROOT)}
        environ |= {"UCX_TLS": LANES[lanes]} if LANES[lanes] else {}
        command = [str(python), str(ROOT / "bench" / "nixl_peer.py"), "--nbytes", str(POOL_BYTES)]
        command += ["--contiguous-bytes", str(PAGES["contiguous"] * PAGE_BYTES["contiguous"])]
        command += ["--blocks", str(PAGES["blocks"]), "--block-bytes", str(PAGE_BYTES["blocks"])]
        command += ["--progress-thread"] if progress_thread else []
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("NIXL's process has no pipes")
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise SystemExit("NIXL's process died")
        return json.loads(line)

    def run(self, what: str) -> Any:
        self._commands.write(what + "\n")
        self._commands.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate(timeout=10)


def nixl_python() -> Path:
    """Return an interpreter that has NIXL, made on first use over the packages of this environment (it needs torch)."""
    home = ROOT / ".venv-nixl"
    python = home / "bin" / "python"
    if not (home / "done").exists():
        log(f"installing {NIXL} into {home.name}")
        venv.create(home, clear=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-input", "--no-deps", NIXL]
        subprocess.run(pip, check=True)
        (home / "done").touch()
    return python


async def compare(lanes: str, rounds: int, python: Path | None) -> dict[str, Any]:
    """Measure one kind of lanes."""
    log(f"measuring over {lanes}")
    ours, memcpy = Ours(lanes), PoolMemcpy()
    peer = Nixl(python, lanes, progress_thread=False) if python else None
    result: dict[str, Any] = {"path": ours.path}
    print(f"\n{lanes}: {ours.path}")
    for case in PAGE_BYTES:
        operations: dict[str, Any] = {"kvmarket": lambda case=case: ours.run(case)}
        if ours.path.startswith("cma("):
            operations["kernel"] = lambda case=case: ours.run_kernel(case)
        if ours.shares and case != "latency":
            operations["kvmarket_shared"] = lambda case=case: ours.run_shared(case)
        if peer is not None:
            operations["nixl"] = lambda case=case, peer=peer: peer.run(case)
        result[case] = await _measure(case, operations, memcpy, rounds)
        if case == "blocks":
            result["right"] = ours.right() and (peer is None or peer.run("right"))
            if ours.shares:
                ours.clear()
                ours.run_shared(case)
                result["right"] = result["right"] and ours.right()
    result["idle_cpu"] = {"kvmarket": ours.idle()} | ({"nixl": peer.run("idle")} if peer else {})
    ours.close()
    if peer is not None and python is not None:
        peer.close()
        peer = Nixl(python, lanes, progress_thread=True)
        for case in PAGE_BYTES:
            operations = {"nixl_progress_thread": lambda case=case, peer=peer: peer.run(case)}
            result[case] |= await _measure(case, operations, memcpy, rounds)
        result["idle_cpu"]["nixl_progress_thread"] = peer.run("idle")
        peer.close()
    print(
        "  idle CPU          " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in result["idle_cpu"].items())
    )
    return result


async def _measure(case: str, operations: dict[str, Any], memcpy: PoolMemcpy, rounds: int) -> dict[str, Any]:
    nbytes = PAGES[case] * PAGE_BYTES[case]
    samples = await interleave(operations, memcpy.operation(case), rounds)
    found: dict[str, Any] = {}
    for name in operations:
        seconds = samples.median(name)
        found[name] = seconds * 1e6 if case == "latency" else samples.ratio(name)
        found[f"{name}_gbps"] = nbytes / seconds / 1e9
        if name.startswith("kvmarket") and case != "latency":
            found[f"{name}_cpu"] = statistics.median(samples.cpu[name]) / statistics.median(samples.reference)
        unit = f"p50 {found[name]:.1f} us" if case == "latency" else f"{found[name]:.3f} of memcpy"
        cost = f"  CPU {found[f'{name}_cpu']:.2f} of memcpy" if f"{name}_cpu" in found else ""
        print(f"  {case:11} {name:21} {unit}  {found[f'{name}_gbps']:.2f} GB/s{cost}")
    for other in ("nixl", "kernel") if case != "latency" else ():
        for name in operations if other in operations else ():
            if name.startswith("kvmarket"):
                times = zip(samples.seconds[other], samples.seconds[name], strict=True)
                found[f"{name}_to_{other}"] = statistics.median(theirs / mine for theirs, mine in times)
                print(f"  {case:11} {f'{name} to {other}':29} {found[f'{name}_to_{other}']:.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, not how fast it is")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds per case (default: %(default)s)")
    parser.add_argument("--peer", choices=["none", "nixl"], default="none", help="whom to run beside")
    parser.add_argument("--nixl-python", type=Path, help="an interpreter that has nixl_cu12 and numpy already")
    parser.add_argument("--lanes", choices=list(LANES), action="append", help="only these")
    args = parser.parse_args()
    if find_spec("ucxx") is None:
        finish({"bench": "transport", "skipped": "ucxx is not installed; pip install 'kvmarket[ucx]'"})
        return
    rounds = QUICK_ROUNDS if args.quick else args.rounds
    python = None if args.peer == "none" else args.nixl_python or nixl_python()
    result = {lanes: asyncio.run(compare(lanes, rounds, python)) for lanes in args.lanes or LANES}
    load = os.getloadavg()[0]
    finish({"bench": "transport", "quick": args.quick, "peer": args.peer, "rounds": rounds, "load": load, **result})


if __name__ == "__main__":
    main()
