"""Which CUDA memory can be lent, and what the errors say about the rest."""

import os
import subprocess
import sys
import textwrap

import pytest

from kvmarket.cuda import cuda_pages, packed_cuda_pages
from kvmarket.errors import InvalidInputError, RegistrationError
from kvmarket.region.pages import PageLayout
from kvmarket.spec import KVCacheSpec
from kvmarket.transport.cuda_ipc import CudaExports

LEND = """
    import torch
    from kvmarket.cuda import cuda_pages
    from kvmarket.errors import RegistrationError
    from kvmarket.region.pages import PageLayout
    from kvmarket.transport.cuda_ipc import CudaExports

    tensor = torch.zeros(8, 1 << 20, dtype=torch.uint8, device="cuda")
    try:
        CudaExports(cuda_pages(PageLayout.packed(8, 1 << 20), [tensor]))
        print("exported")
    except RegistrationError as error:
        print(error)
"""


def lend_with(allocator):
    """Lend a torch tensor in a process with these allocator settings; return what it printed."""
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": allocator, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LEND)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchs_default_allocator_can_be_lent():
    assert lend_with("") == "exported\n"


def test_expandable_segments_are_recognised():
    message = lend_with("expandable_segments:True")
    assert "remove expandable_segments:True from PYTORCH_CUDA_ALLOC_CONF" in message


def test_torchs_asynchronous_allocator_is_recognised():
    assert "backend:cudaMallocAsync" in lend_with("backend:cudaMallocAsync")


def test_cupys_memory_pools(gpu):
    cupy, layout = gpu.cupy, PageLayout.packed(4, 1 << 20)
    pool = cupy.cuda.MemoryAsyncPool()
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.zeros(4 << 20, cupy.uint8)
    with pytest.raises(RegistrationError, match="memory pool"):
        CudaExports(cuda_pages(layout, [array]))
    array = cupy.zeros(4 << 20, cupy.uint8)
    assert CudaExports(cuda_pages(layout, [array])).addresses(bytes(64))[1].nbytes == 4 << 20


def test_a_tensor_inside_an_allocation_is_exported_with_its_offset(gpu, torch):
    pool = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    address = gpu.export(cuda_pages(PageLayout.packed(1, 4096), [pool[12_288:16_384]]).memories[0])
    whole = gpu.export(cuda_pages(PageLayout.packed(1, 64 << 20), [pool]).memories[0])
    assert (address.handle, address.buffer_id) == (whole.handle, whole.buffer_id)
    assert address.offset == whole.offset + 12_288
    assert address.allocation_bytes >= 64 << 20


def test_views_with_holes_and_host_tensors_are_refused(torch):
    base = torch.zeros((4, 100, 16), dtype=torch.uint8, device="cuda")
    with pytest.raises(InvalidInputError, match="holes"):
        cuda_pages(PageLayout.packed(1, 64), [base[:, :50]])
    with pytest.raises(InvalidInputError, match="CUDA tensor"):
        cuda_pages(PageLayout.packed(1, 64), [base.cpu()])
    assert len(cuda_pages(PageLayout.packed(1, 64), [base.permute(2, 0, 1)]).memories[0]) == base.numel()


def test_targets_of_the_wrong_shape_are_refused_by_name(torch):
    spec = KVCacheSpec(2, 2, 8, "float16", 4)
    good = torch.zeros((3, spec.page_bytes // 2), dtype=torch.float16, device="cuda")
    assert packed_cuda_pages(good, spec).layout.num_pages == 3
    for bad, word in ((good.float(), "float32"), (good[:, :-1], "shape"), (good[:0], "shape")):
        with pytest.raises(InvalidInputError, match=word):
            packed_cuda_pages(bad, spec, "out")
