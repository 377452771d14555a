"""What is measured, under the names that Prometheus shows. Whoever counts something new enters it here."""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "kvmarket_"


class Family(NamedTuple):
    """One family of metrics.

    Attributes:
        kind: ``counter``, ``gauge`` or ``histogram`` (of seconds).
        text: what it says.
        label: the name of its one label, or empty. Its values are few: reasons, phases, transports, paths.
    """

    kind: str
    text: str
    label: str = ""


FAMILIES = {
    # look-ups and fetches
    "fetches": Family("counter", "fetches by Marketplace.fetch"),
    "fetch_ended": Family("counter", "fetches that did not adopt all full blocks, by the reason", "reason"),
    "tokens_asked": Family("counter", "tokens of fetched prompts"),
    "tokens_adopted": Family("counter", "tokens whose KV was fetched and proven"),
    "blocks_adopted": Family("counter", "blocks read from peers and proven"),
    "blocks_verified": Family("counter", "adopted or refused blocks whose bytes were compared with a digest"),
    "blocks_refused": Family("counter", "blocks that were read, or were to be, and not delivered, by reason", "reason"),
    "lookups": Family("counter", "prefixes looked up in the registry"),
    "misses": Family("counter", "look-ups that ended before the prompt did, by reason", "reason"),
    "transport_reads": Family("counter", "reads from peers, by the transport that carried them", "transport"),
    "transport_bytes": Family("counter", "valid bytes read from peers, by the transport that did", "transport"),
    "path_reads": Family("counter", "reads from peers, by the way they took: mapped memory, or lanes of UCX", "path"),
    "path_bytes": Family("counter", "valid bytes read from peers, by the way they took", "path"),
    "tier_blocks": Family("counter", "blocks read and proven, by the tier that held them: engine, host, disk", "tier"),
    "connections_failed": Family("counter", "owners that could not be connected to or read from, by reason", "reason"),
    # publishing
    "blocks_announced": Family("counter", "blocks that the registry took"),
    "blocks_withdrawn": Family("counter", "blocks whose records were removed again by their owner"),
    "announcements_dropped": Family("counter", "blocks not announced because too many waited"),
    "announcements_failed": Family("counter", "blocks that the registry did not take"),
    "announcements_postponed": Family("counter", "blocks kept for later because the registry was away"),
    "epochs_observed": Family("counter", "times this process forgot because another one bumped the epoch"),
    # the registry, as this process sees it
    "owners_fenced": Family("counter", "dead owners whose records this process removed"),
    "lease_renewals": Family("counter", "heartbeats of owners of this process that the registry server took"),
    "leases_expired": Family("counter", "leases of this process that ran out or were lost"),
    "blocks_reannounced": Family("counter", "blocks announced again after a lease was lost"),
    "server_failures": Family("counter", "questions that the registry server did not answer"),
    "stale_records_removed": Family("counter", "records removed because their owner's page had moved on"),
    # arenas and disk
    "arena_evicted": Family("counter", "blocks that left an arena, by reason", "reason"),
    "arena_blocks_turned_away": Family("counter", "blocks that found no room in an arena that leases and pins fill"),
    "disk_blocks_written": Family("counter", "blocks written to the disk tier"),
    "disk_blocks_missed": Family("counter", "blocks that were evicted before they could be written"),
    "disk_blocks_dropped": Family("counter", "blocks not written because too many waited"),
    "disk_blocks_promoted": Family("counter", "blocks taken from disk into the arena after a start"),
    "disk_blocks_damaged": Family("counter", "blocks on disk that were not what was written; they are not served"),
    "disk_errors": Family("counter", "errors of the disk; the first switches the tier off"),
    # now
    "arena_resident_bytes": Family("gauge", "memory of arenas that holds published blocks"),
    "arena_blocks_pinned": Family("gauge", "blocks of arenas that are pinned"),
    "disk_bytes": Family("gauge", "size of the log on disk"),
    "disk_blocks": Family("gauge", "blocks in the log on disk"),
    "announce_queue": Family("gauge", "batches waiting for the announcing thread"),
    "announce_backlog": Family("gauge", "batches waiting for the registry to be back"),
    "offered_blocks": Family("gauge", "blocks that this process offers to peers"),
    "epoch": Family("gauge", "the namespace's epoch, the highest of this process's namespaces"),
    "marketplaces": Family("gauge", "open marketplaces of this process"),
    "registry_away": Family("gauge", "1 while the registry server counts as away and is not asked"),
    # durations
    "lookup_seconds": Family("histogram", "one look-up in the registry"),
    "announce_seconds": Family("histogram", "one batch of announcements taken by the registry"),
    "fetch_seconds": Family("histogram", "fetches, by phase: hash, lookup, connect, read, verify, total", "phase"),
}
"""Every family by the name that `kvmarket.metrics.Metrics` knows it by."""


def shown_name(name: str) -> str:
    """Return the family's name as Prometheus shows it."""
    return f"{PREFIX}{name}_total" if FAMILIES[name].kind == "counter" else PREFIX + name
