import pickle
import subprocess
import sys

import pytest

import kvmarket
from kvmarket import errors

PUBLIC = [
    "ArenaFullError",
    "ConfigError",
    "DeadlineExceededError",
    "FetchReport",
    "FetchResult",
    "IncompatibleSpecError",
    "InvalidInputError",
    "KVCacheSpec",
    "KVMarketError",
    "MarketClosedError",
    "MarketConfig",
    "MarketCore",
    "Marketplace",
    "MatchReport",
    "MissReason",
    "MissingExtraError",
    "ModelIdentity",
    "Namespace",
    "PublishReport",
    "RegistryError",
    "TransferReport",
    "TransportError",
]


def test_the_public_names_are_pinned():
    assert kvmarket.__all__ == PUBLIC
    assert all(getattr(kvmarket, name) for name in PUBLIC)


def test_importing_is_light_and_has_no_effects():
    code = (
        "import sys, threading, os, time; began = time.perf_counter(); import kvmarket;"
        "print(time.perf_counter() - began);"
        "heavy = {'torch', 'ucxx', 'cupy', 'vllm', 'transformers', 'redis', 'triton', 'pytest', 'lmdb'};"
        "heavy |= {'prometheus_client', 'kvmarket.exporter'};"
        "print(sorted(heavy & set(sys.modules)));"
        "print(threading.active_count());"
        "print(sorted(os.listdir('/proc/self/fd'), key=int)[:4])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy, threads, descriptors = done.stdout.splitlines()
    print(f"import kvmarket: {float(seconds):.3f} s")
    assert heavy == "[]"
    assert threads == "1"
    assert descriptors == "['0', '1', '2', '3']", "3 is the listing itself"


def error_classes(base):
    return {base} | {found for child in base.__subclasses__() for found in error_classes(child)}


@pytest.mark.parametrize("kind", sorted(error_classes(errors.KVMarketError), key=lambda kind: kind.__name__))
def test_errors_survive_pickling(kind):
    arguments = {
        errors.MissingExtraError: ("blake3", "extra"),
        errors.IncompatibleSpecError: ("dtype", "float16", "bfloat16"),
    }
    error = kind(*arguments.get(kind, ("what happened",)))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the line itself
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_errors_are_also_what_python_code_expects():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.DeadlineExceededError, TimeoutError)
    assert issubclass(errors.RegistryUnavailableError, ConnectionError)
    assert issubclass(errors.RegistryFullError, errors.RegistryUnavailableError)
    assert issubclass(errors.TransferTimeoutError, TimeoutError)
    assert issubclass(errors.NamespaceDeniedError, PermissionError)
