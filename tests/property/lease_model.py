"""A registry server and a bad network without I/O: what the scripts do, on dictionaries, under a clock of its own."""

import struct
from collections import defaultdict

from kvmarket.errors import RegistryUnavailableError
from kvmarket.registry import redis_scripts as scripts
from kvmarket.registry.records import HEAD_BYTES


class ModelServer:
    """The state of a server; `now` is its clock."""

    def __init__(self):
        self.now = 1000.0
        self.lose_everything()

    def lose_everything(self):
        self.values, self.expires = {}, {}
        self.sets, self.hashes = defaultdict(set), defaultdict(dict)

    def get(self, key):
        if key in self.expires and self.expires[key] <= self.now:
            del self.values[key], self.expires[key]
        return self.values.get(key)

    def put(self, key, value, lease_ms):
        self.values[key], self.expires[key] = value, self.now + lease_ms / 1000

    def delete(self, key):
        self.values.pop(key, None)
        self.expires.pop(key, None)
        self.sets.pop(key, None)
        self.hashes.pop(key, None)

    # ---- commands

    def command(self, name, *rest):
        return getattr(self, "do_" + name.decode().lower())(*rest)

    def do_getex(self, key, _px, lease_ms):
        if self.get(key) is not None:
            self.expires[key] = self.now + lease_ms / 1000
        return self.get(key)

    def do_exists(self, key):
        return int(self.get(key) is not None)

    def do_smembers(self, key):
        return sorted(self.sets[key])

    def do_sadd(self, key, member):
        self.sets[key].add(b"%d" % member)

    def do_srem(self, key, member):
        found = b"%d" % member in self.sets[key]
        self.sets[key].discard(b"%d" % member)
        return int(found)

    def do_del(self, *keys):
        for key in keys:
            self.delete(key)

    # ---- scripts

    def script(self, script, keys, args):
        kinds = {getattr(scripts, name): name.lower() for name in NAMES}
        return getattr(self, "run_" + kinds[script])(keys, args)

    def run_register(self, keys, args):
        number, lease_ms, body = args
        if b"%d" % number in self.sets[keys[0]] or self.get(keys[1]) is not None:
            return 0
        self.sets[keys[0]].add(b"%d" % number)
        self.put(keys[1], body, lease_ms)
        return 1

    def run_join(self, keys, args):
        if self.get(keys[0]) != args[1]:
            return 0
        self.sets[keys[1]].add(args[0])
        return 1

    def run_admit(self, keys, args):
        if self.get(keys[0]) not in (None, args[0]):
            return 0
        self.put(keys[0], *args)
        return 1

    def run_region(self, keys, args):
        if self.get(keys[0]) != args[2]:
            return 0
        self.hashes[keys[1]][args[0]] = args[1]
        return 1

    def run_change(self, keys, args):
        epoch, body, ttl, owner, head, counts, *rest = args
        if self.values.get(keys[0], 0) != epoch:
            return 0
        if self.get(keys[1]) != body:
            return -1
        index, rest = self.hashes[keys[2]], iter(rest)
        sizes = [struct.unpack(">HH", counts[at : at + 4]) for at in range(0, len(counts), 4)]
        for run, (gets, _) in zip(keys[3:], sizes, strict=True):
            for _ in range(gets):
                field, blocks, stretch = next(rest), next(rest), next(rest)
                self.hashes[run].setdefault(field, {})[owner] = (self.now + ttl, stretch)
                index[run[-head:] + field] = blocks
        for run, (_, loses) in zip(keys[3:], sizes, strict=True):
            for _ in range(loses):
                field = next(rest)
                self.hashes[run].get(field, {}).pop(owner, None)
                index.pop(run[-head:] + field, None)
        return 1

    def run_purge(self, keys, args):
        for key in keys[1:]:
            self.delete(key)
        index = self.hashes[keys[0]]
        for member in list(index)[: args[2]]:
            del index[member]
            self.hashes[args[0] + member[: args[3]]].get(member[args[3] :], {}).pop(args[1], None)
        return len(index)

    def run_bump(self, keys, _args):
        self.values[keys[0]] = max(self.values.get(keys[0], 0) + 1, int(self.now * 1e6))
        return self.values[keys[0]]

    def lookup(self, digest, key):
        """Owner number -> record of one block, as a look-up finds it."""
        epoch = self.values.get(scripts.namespace_key(digest, b"e"), 0)
        found = {}
        for field, held in self.hashes[scripts.namespace_key(digest, b"r", epoch, key[:HEAD_BYTES])].items():
            for owner, (until, stretch) in held.items():
                number, record = int.from_bytes(owner, "big"), block_of(field, stretch, key[HEAD_BYTES:])
                alive = self.get(scripts.namespace_key(digest, b"l", number)) is not None
                if record is not None and until > self.now and alive:
                    found[number] = record
        return found


def block_of(field, stretch, asked):
    """The record of one block (index | hash) of a stretch that is kept under `field`, or None."""
    blocks, _, size = scripts.STRETCH_HEAD.unpack_from(stretch)
    width, at = len(field) - 4, int.from_bytes(asked[:4], "big") - int.from_bytes(field[:4], "big")
    if not 0 <= at < blocks:
        return None
    hashes = field[4:] + stretch[scripts.STRETCH_HEAD.size :]
    if hashes[at * width : (at + 1) * width] != asked[4:]:
        return None
    return stretch[len(stretch) - (blocks - at) * size :][:size]


NAMES = ("REGISTER", "JOIN", "ADMIT", "REGION", "CHANGE", "PURGE", "BUMP")


class BadLink:
    """What `Owners` takes for its link: loses requests and answers, repeats them, and delivers some much later."""

    def __init__(self, server, rng):
        self.server, self.rng, self.faults, self.late = server, rng, 0.0, []

    def _deliver(self, apply):
        if self.rng.random() >= self.faults:
            return apply()
        kind = self.rng.choice(["request lost", "answer lost", "late", "twice", "slow"])
        if kind == "twice":
            apply()
            return apply()
        self.server.now += self.rng.choice([0.1, 0.5, 3.0])
        if kind == "slow":
            return apply()
        if kind == "answer lost":
            apply()
        elif kind == "late":
            self.late.append(apply)
        raise RegistryUnavailableError(kind)

    def deliver_late(self):
        """Deliver what was given up, in any order."""
        self.rng.shuffle(self.late)
        late, self.late = self.late, []
        for apply in late:
            apply()

    def run(self, script, keys, args):
        return self._deliver(lambda: self.server.script(script, keys, args))

    def call(self, *command):
        return self._deliver(lambda: self.server.command(*command))

    def send(self, commands):
        return self._deliver(lambda: [self.server.command(*command) for command in commands])

    @staticmethod
    def checked(reply):
        return reply
