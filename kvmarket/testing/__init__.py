"""Shipped test tools: conformance suites for the interfaces, and real engines for adapters."""
