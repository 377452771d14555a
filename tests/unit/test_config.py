from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from kvmarket.config import MarketConfig, default_runtime_dir
from kvmarket.errors import ConfigError

GOOD = {
    "KVMARKET_TRANSPORT": ("shm", "transport", "shm"),
    "KVMARKET_UCX_REQUIRE": ("rdma", "ucx_require", "rdma"),
    "KVMARKET_UCX_CONNECT_S": ("7.5", "ucx_connect_s", 7.5),
    "KVMARKET_UCX_ADDRESSES": ("10.1.2.3,fd00::1", "ucx_addresses", "10.1.2.3,fd00::1"),
    "KVMARKET_REGISTRY": ("lmdb:///run/market", "registry", "lmdb:///run/market"),
    "KVMARKET_RUNTIME_DIR": ("/run/x", "runtime_dir", "/run/x"),
    "KVMARKET_HASH": ("xxh3_128", "hash", "xxh3_128"),
    "KVMARKET_VERIFY": ("sampled", "verify", "sampled"),
    "KVMARKET_FETCH_DEADLINE_S": ("0.25", "fetch_deadline_s", 0.25),
    "KVMARKET_PUBLISH_DEADLINE_S": ("3", "publish_deadline_s", 3.0),
    "KVMARKET_FETCH_CONCURRENCY": ("7", "fetch_concurrency", 7),
    "KVMARKET_ARENA_BYTES": ("1.5GiB", "arena_bytes", 3 << 29),
    "KVMARKET_REGISTRY_BYTES": ("64m", "registry_bytes", 64 << 20),
    "KVMARKET_TENANT": ("acme", "tenant", "acme"),
    "KVMARKET_SALT": ("s3cret", "salt", "s3cret"),
}
BAD = {
    "KVMARKET_TRANSPORT": ["", "SHM", "rdma"],
    "KVMARKET_UCX_REQUIRE": ["tcp", "RDMA"],
    "KVMARKET_UCX_CONNECT_S": ["0", "-1", "nan", "soon", "1e9"],
    "KVMARKET_UCX_ADDRESSES": ["eth0", "10.1.2.3:80", "10.1.2", "10.1.2.3;10.1.2.4"],
    "KVMARKET_REGISTRY": ["", "redis", "lmdb://", "lmdb://relative", "lmdb:/x"],
    "KVMARKET_HASH": ["", "md5", "hash"],
    "KVMARKET_VERIFY": ["", "yes"],
    "KVMARKET_FETCH_DEADLINE_S": ["", "0", "-1", "nan", "inf", "601", "1s"],
    "KVMARKET_PUBLISH_DEADLINE_S": ["", "0", "nan"],
    "KVMARKET_FETCH_CONCURRENCY": ["", "0", "257", "1.5", "four"],
    "KVMARKET_ARENA_BYTES": ["", "0", "4095", "-1m", "1e3", "lots", "m", "infg", "nank", "16385g", "1 megabyte"],
    "KVMARKET_REGISTRY_BYTES": ["1", "1023k", "2t"],
}


def test_every_setting_is_tried_below():
    names = {field.metadata["env"] for field in fields(MarketConfig)}
    assert set(GOOD) == names
    assert set(BAD) == names - {"KVMARKET_RUNTIME_DIR", "KVMARKET_TENANT", "KVMARKET_SALT"}, "those three take any text"


@pytest.mark.parametrize("name", GOOD)
def test_settings_come_from_the_environment(name):
    text, field, value = GOOD[name]
    assert getattr(MarketConfig.from_env({name: text, "HOME": "/root"}), field) == value
    assert getattr(MarketConfig(**{field: value}), field) == value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_bad_values_are_refused_by_name(name, text):
    with pytest.raises(ConfigError, match=name):
        MarketConfig.from_env({name: text})


@pytest.mark.parametrize("name", ["KVMARKET_FOO", "KVMARKET_", "KVMARKET_transport", "KVMARKET_TRANSPORTS"])
def test_unknown_names_are_refused_and_the_known_ones_told(name):
    with pytest.raises(ConfigError, match=f"{name};.*KVMARKET_TRANSPORT"):
        MarketConfig.from_env({name: "x"})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        (" 8 MiB ", 8 << 20),
        ("2g", 2 << 30),
        ("0.5m", 1 << 19),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_have_units(text, nbytes):
    assert MarketConfig.from_env({"KVMARKET_ARENA_BYTES": text}).arena_bytes == nbytes


def test_arguments_win_over_the_environment():
    assert MarketConfig.from_env({"KVMARKET_VERIFY": "none"}, verify="full").verify == "full"


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("KVMARKET_TENANT", "from here")
    assert MarketConfig.from_env().tenant == "from here"
    assert MarketConfig().tenant == "", "only from_env reads it"
    assert MarketConfig.from_env({}).tenant == ""


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("transport", None),
        ("runtime_dir", Path("/x")),
        ("arena_bytes", "256m"),
        ("arena_bytes", True),
        ("arena_bytes", 1),
        ("fetch_deadline_s", "1"),
        ("fetch_deadline_s", float("nan")),
        ("fetch_concurrency", 0),
    ],
)
def test_bad_arguments_are_refused_by_name(field, bad):
    with pytest.raises(ConfigError, match=field):
        MarketConfig(**{field: bad})


def test_integers_do_for_seconds():
    assert MarketConfig(fetch_deadline_s=2).fetch_deadline_s == 2.0


def test_the_salt_is_never_shown():
    assert "s3cret" not in repr(MarketConfig(salt="s3cret"))
    with pytest.raises(ConfigError, match="salt") as caught:
        MarketConfig(salt=b"s3cret")
    assert "s3cret" not in str(caught.value)


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        MarketConfig().verify = "none"


def test_directories(monkeypatch, tmp_path):
    assert MarketConfig(runtime_dir="/x").directory == Path("/x")
    assert MarketConfig(runtime_dir="/x", registry="lmdb:///y/z").directory == Path("/y/z")
    assert MarketConfig().directory == default_runtime_dir()
    assert default_runtime_dir().is_absolute()
    monkeypatch.setattr("os.access", lambda *args: False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_runtime_dir().parent == tmp_path


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting():
    """A service called kvmarket puts these into every container of its namespace."""
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    assert MarketConfig.from_env({f"KVMARKET_{name}": "10.0.0.1" for name in names}) == MarketConfig()
    with pytest.raises(ConfigError, match="KVMARKET_PORTS"):
        MarketConfig.from_env({"KVMARKET_PORTS": "1"})
