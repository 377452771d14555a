"""Replicas for the vLLM tests: vLLM is imported once a session, engines live as long as the module that starts them."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvmarket.testing.shared_prefix import CONNECTOR
from kvmarket.testing.tiny_models import TINY_MODEL, write_model
from kvmarket.testing.vllm_replica import Replica, ReplicaConfig, ReplicaError, ReplicaHost

HERE = Path(__file__).parent
ENGINES_NICE = 5  # engines compute whenever they can; the tests beside them mostly wait, and have deadlines


def pytest_collection_modifyitems(items):
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@dataclass
class Fleet:
    """Starts replicas that meet in one runtime directory of their own."""

    host: ReplicaHost
    model: Path
    runtime_dir: Path
    replicas: list[Replica] = field(default_factory=list)

    def config(self, *, plain=False, role="kv_both", environ=None, extra=None, **fields):
        """Describe a replica: with the connector unless `plain`; `extra` is ``kv_connector_extra_config``."""
        connector = {**CONNECTOR, "kv_role": role, "kv_connector_extra_config": extra or {}} if not plain else None
        settings = {"KVMARKET_RUNTIME_DIR": str(self.runtime_dir), **(environ or {})}
        return ReplicaConfig(**{"model": self.model, "connector": connector, "environ": settings, **fields})

    def launch(self, **options):
        replica = self.host.launch(self.config(**options))
        self.replicas.append(replica)
        return replica

    def start(self, **options):
        replica = self.launch(**options)
        replica.wait_ready()
        return replica

    def start_all(self, *options):
        """Start several replicas at the same time."""
        replicas = [self.launch(**each) for each in options]
        for replica in replicas:
            replica.wait_ready()
        return replicas

    def publish(self, replica, prompts, *, max_tokens=1, **options):
        """Have a replica compute prompts, and wait until peers can find them."""
        answers = replica.generate(prompts, max_tokens=max_tokens, **options)
        replica.call("vllm_faults:flush")
        return answers

    def close(self):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_end, self.replicas))
        self.replicas.clear()


def _end(replica):
    if replica.alive:
        with suppress(ReplicaError):
            replica.stop(timeout_s=10)
    replica.close()


@pytest.fixture(scope="session")
def vllm_host():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.nice(ENGINES_NICE)
    with ReplicaHost(python_path=[HERE]) as host:
        yield host


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models"), TINY_MODEL)


@pytest.fixture(scope="module")
def fleet(vllm_host, tiny_model, tmp_path_factory):
    """Replicas that meet in one directory, and end with the module."""
    fleet = Fleet(vllm_host, tiny_model, tmp_path_factory.mktemp("market") / "runtime")
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def truth(vllm_host, tiny_model):
    """A replica without the connector: what it answers is right."""
    replica = vllm_host.start(ReplicaConfig(model=tiny_model))
    yield replica
    if replica.alive:
        replica.stop()
