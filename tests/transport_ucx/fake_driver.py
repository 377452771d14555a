"""Stand-ins for what the state machines of the UCX transport act on, for tests of their messages alone."""

from types import SimpleNamespace

from kvmarket.transport.ucx_proof import ProofKey
from kvmarket.transport.ucx_wire import MESSAGE_BYTES_MAX, decode

INCARNATION = bytes(range(16))


class Recorder:
    """A driver that only notes what a state machine does."""

    alive = True

    def __init__(self):
        self.tickers, self.closed, self.sent, self.said = set(), [], 0, []

    def send_control(self, endpoint, data):
        self.sent += 1
        assert len(data) <= MESSAGE_BYTES_MAX
        self.said = [*self.said[-7:], decode(data)]

    def send_data(self, endpoint, header, iov, done):
        done(0)

    def receive(self, endpoint, payload, iov, done):
        assert int(iov[:, 1].sum()) == payload.length
        done(0)

    def drop(self, payload):
        """Nothing to give back."""

    def disconnect(self, endpoint, why):
        self.closed.append(why)

    def connect(self, address, port, handler):
        return object()

    def lanes(self, endpoint):
        return (("tcp", "lo"),)


class FakeServer:
    def __init__(self, driver, owner, key=None):
        self.driver, self.incarnation, self.sessions, self.key = driver, INCARNATION, set(), key or ProofKey()
        self.regions = {region.region_id: region for region in owner._regions}

    def keys(self, region):
        return SimpleNamespace(memories=[(4096, 256, b"key")], table=[(8192, 4128, b"key")])
