"""Memory that is lent to peers: pages, their generations, and arenas of our own."""

from kvmarket.region.arena import Arena
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.generations import GenerationTable
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.region.region import LentRegion

__all__ = [
    "Arena",
    "CudaPagedMemory",
    "GenerationTable",
    "LentRegion",
    "PageLayout",
    "PagedMemory",
    "RegionDescriptor",
    "Segment",
    "SharedMemory",
]
