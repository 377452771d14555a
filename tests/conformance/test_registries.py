import pytest

from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.registry_suite import RegistryConformance


class TestMemory(RegistryConformance):
    def make_registry(self):
        return MemoryRegistry()


class TestLmdb(RegistryConformance):
    @pytest.fixture(autouse=True)
    def directory(self, runtime_dir):
        self.where = runtime_dir

    def make_registry(self):
        return LmdbRegistry(self.where, map_bytes=64 << 20)

    def open_elsewhere(self):
        return LmdbRegistry, (self.where,)
