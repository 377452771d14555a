"""How pages travel: one interface, a backend per kind of reach, and the choice between them."""

from kvmarket.transport.base import Capabilities, Connection, ReadRequest, ServingTransport, Transport
from kvmarket.transport.select import TransportSelector

__all__ = ["Capabilities", "Connection", "ReadRequest", "ServingTransport", "Transport", "TransportSelector"]
