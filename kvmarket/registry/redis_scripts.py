"""What runs inside the server: each script is one atomic step on one hash slot.

Keys of a namespace share the slot of its digest, keys of owners share another:

    kvm:2:{<digest>}:e                   the namespace's epoch
    kvm:2:{<digest>}:h                   held back: restored after the server lost it, not served until this expires
    kvm:2:{<digest>}:l:<owner>           the owner's lease in this namespace: who it is, for the lease's time
    kvm:2:{<digest>}:i:<epoch>:<owner>   HASH block key -> blocks: its stretches, so that fencing it costs its own keys
    kvm:2:{<digest>}:r:<epoch>:<head>    HASH of the stretches of one run: index | hash of the first block -> segments

    kvm:2:{owners}:s                     SET of owners that are not fenced
    kvm:2:{owners}:l:<owner>             its lease
    kvm:2:{owners}:g:<owner>             HASH region number -> descriptor
    kvm:2:{owners}:n:<owner>             SET of digest | epoch it announced in
    kvm:2:{owners}:d                     HASH digest -> description of every namespace

A *stretch* is blocks of one run, one after the other, that one owner announced; it is kept under its first block. A
segment is ``length (4) | owner (4) | expires (4) | stretch``, and a stretch is

    blocks (2) | skipped (2) | bytes of a record (2) | hashes of all blocks but the first | records of those not skipped

Only a look-up (`redis_search`) reads what is in a stretch. An owner's process knows where each of its blocks is.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from kvmarket.registry.redis_link import Script

SEGMENT = struct.Struct(">I4sI")
STRETCH_HEAD = struct.Struct(">HHH")
OWNERS_PER_BLOCK_MAX = 64
"""More owners of one stretch than this replace the oldest: who looks it up has enough to choose from."""

REST = """
-- Everything in `segments` but what `owner` said and what has expired.
local function rest(segments, owner, now)
  local kept, at = {}, 1
  while at <= #segments do
    local length, who, expires = struct.unpack('>I4c4I4', segments, at)
    if who ~= owner and expires > now then kept[#kept + 1] = string.sub(segments, at, at + length - 1) end
    at = at + length
  end
  return kept
end
-- Remove what `owner` said in one field.
local function remove(key, field, owner, now)
  local before = redis.call('HGET', key, field)
  if not before then return end
  local kept = rest(before, owner, now)
  if #kept == 0 then redis.call('HDEL', key, field) else redis.call('HSET', key, field, table.concat(kept)) end
end
"""

CHANGE = Script(
    REST
    + """
-- What an owner announces, and which stretches are no more. KEYS: e, lease, index, runs...
-- ARGV: epoch, who it is, seconds to live, owner, bytes of a head, how many each run gets and loses (2 bytes each);
-- then field, blocks and stretch of all it gets; then the field of all it loses, in the order of runs.
-- Returns 1, or 0 (another epoch), -1 (no lease); then nothing was changed.
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then return 0 end
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return -1 end
local owner, head, a = ARGV[4], tonumber(ARGV[5]), 7
local now, ttl = tonumber(redis.call('TIME')[1]), tonumber(ARGV[3]) + 1 -- this second has begun already
for r = 4, #KEYS do -- first what takes room: a server that has none refuses the first of it
  local key = KEYS[r]
  local gets = struct.unpack('>I2', ARGV[6], 4 * (r - 4) + 1)
  for _ = 1, gets do
    local field, stretch = ARGV[a], ARGV[a + 2]
    local segment = struct.pack('>I4c4I4', 12 + #stretch, owner, now + ttl) .. stretch
    local before = redis.call('HGET', key, field)
    if before then
      local kept = rest(before, owner, now)
      while #kept >= """
    + str(OWNERS_PER_BLOCK_MAX)
    + """ do table.remove(kept, 1) end
      kept[#kept + 1] = segment
      segment = table.concat(kept)
    end
    redis.call('HSET', key, field, segment)
    redis.call('HSET', KEYS[3], string.sub(key, -head) .. field, ARGV[a + 1])
    a = a + 3
  end
  if gets > 0 then redis.call('EXPIRE', key, ttl) end
end
if a > 7 then redis.call('EXPIRE', KEYS[3], ttl) end
for r = 4, #KEYS do
  for _ = 1, struct.unpack('>I2', ARGV[6], 4 * (r - 4) + 3) do
    remove(KEYS[r], ARGV[a], owner, now)
    redis.call('HDEL', KEYS[3], string.sub(KEYS[r], -head) .. ARGV[a])
    a = a + 1
  end
end
return 1
"""
)

PURGE = Script(
    REST
    + """
-- Remove up to ARGV[3] stretches of an owner. KEYS: index, lease (or nothing)
-- ARGV: prefix of runs, owner, limit, bytes of a head
-- Returns how many it still has. The lease goes first: what is left is not served any more.
if KEYS[2] then redis.call('DEL', KEYS[2]) end
local now, head = tonumber(redis.call('TIME')[1]), tonumber(ARGV[4])
for _, member in ipairs(redis.call('HRANDFIELD', KEYS[1], ARGV[3])) do
  remove(ARGV[1] .. string.sub(member, 1, head), string.sub(member, head + 1), ARGV[2], now)
  redis.call('HDEL', KEYS[1], member)
end
return redis.call('HLEN', KEYS[1])
"""
)

REGISTER = Script("""
-- KEYS: s, lease   ARGV: number, lease in ms, who it is.   Returns 0 where the number is in use.
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 1 or redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
return 1
""")

JOIN = Script("""
-- KEYS: lease, n   ARGV: digest and epoch, who it is.   Returns 0 without a lease: nothing brings an expired one back.
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('SADD', KEYS[2], ARGV[1])
return 1
""")

ADMIT = Script("""
-- Make a lease known in a namespace. KEYS: lease there   ARGV: who it is, ms.   Returns 0 where it is another's.
if (redis.call('GET', KEYS[1]) or ARGV[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

REGION = Script("""
-- KEYS: lease, g   ARGV: region number, descriptor, who it is.   Returns 0 without a lease.
if redis.call('GET', KEYS[1]) ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
""")

OPEN = Script("""
-- Make a namespace's epoch known, at least the proposed one. KEYS: e, h   ARGV: proposed epoch or 0, ms to hold it back
-- What the server has lost comes back as the highest epoch any process knows; until all have told, nothing is served.
local now = redis.call('TIME')
local proposed, current = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or '0')
if current > 0 and current >= proposed then return current end
if proposed == 0 then proposed = now[1] * 1000000 + now[2]
elseif current == 0 then redis.call('SET', KEYS[2], '1', 'PX', ARGV[2]) end
redis.call('SET', KEYS[1], string.format('%.0f', proposed))
return proposed
""")

BUMP = Script("""
-- KEYS: e   Returns the new epoch, or 0 for a namespace that is not known.
local current = tonumber(redis.call('GET', KEYS[1]) or '0')
if current == 0 then return 0 end
local now = redis.call('TIME')
local epoch = math.max(current + 1, now[1] * 1000000 + now[2])
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
""")


def namespace_key(digest: bytes, kind: bytes, *parts: bytes | int) -> bytes:
    """Return the name of a key in a namespace's slot."""
    return _slot(digest) + b":".join((kind, *map(_text, parts)))


@lru_cache(1024)
def _slot(digest: bytes) -> bytes:
    return b"kvm:2:{%b}:" % digest.hex().encode()


def owners_key(kind: bytes, *parts: bytes | int) -> bytes:
    """Return the name of a key in the owners' slot."""
    return b"kvm:2:{owners}:" + b":".join((kind, *map(_text, parts)))


def _text(part: bytes | int) -> bytes:
    return b"%d" % part if isinstance(part, int) else part
