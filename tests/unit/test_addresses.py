import pytest

from kvmarket.addresses import listening_address, parse_address

GOOD = [("host:1", ("host", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:0", ("::1", 0))]


@pytest.mark.parametrize(("text", "address"), GOOD)
def test_addresses_are_read(text, address):
    assert parse_address(text) == address
    assert listening_address(text) == address


def test_a_port_alone_listens_on_the_loopback_address():
    assert listening_address("9400") == ("127.0.0.1", 9400)
    assert parse_address("9400") is None


@pytest.mark.parametrize(
    "text", ["", ":", ":1", "host:", "host:65536", "host:x", "::1:9400", "[::1]", "a b:1", "[]:1", "-1", "1.5"]
)
def test_what_is_no_address_is_refused(text):
    assert parse_address(text) is None
    with pytest.raises(ValueError, match="HOST:PORT"):
        listening_address(text)
