"""What runs inside the server: each script is one atomic step on one hash slot.

Keys of a namespace share the slot of its digest, keys of owners share another:

    kvm:{<digest>}:e                   the namespace's epoch
    kvm:{<digest>}:h                   held back: restored after the server lost it, not served until this expires
    kvm:{<digest>}:l:<owner>           the owner's lease in this namespace: who it is, for the lease's time
    kvm:{<digest>}:i:<epoch>:<owner>   SET of the block keys of its entries, so that fencing it costs its own keys
    kvm:{<digest>}:r:<epoch>:<head>    HASH of the entries of one run: index | block hash -> segments

    kvm:{owners}:s                     SET of owners that are not fenced
    kvm:{owners}:l:<owner>             its lease
    kvm:{owners}:g:<owner>             HASH region number -> descriptor
    kvm:{owners}:n:<owner>             SET of digest | epoch it announced in
    kvm:{owners}:d                     HASH digest -> description of every namespace

A segment is what one owner says of one block: ``length (1) | expires (4) | record``. Scripts look at the owner inside a
record of this major version and at nothing else of it.
"""

from __future__ import annotations

from kvmarket.registry.redis_link import Script

SEGMENT_HEAD = 5
OWNERS_PER_BLOCK_MAX = 64
"""More owners of one block than this replace the oldest: who looks it up has enough to choose from."""

_COMMON = """
local sub, byte = string.sub, string.byte
local function number(four)
  local a, b, c, d = byte(four, 1, 4)
  return string.format('%.0f', ((a * 256 + b) * 256 + c) * 256 + d)
end
-- The block keys of run `run` (from 0), which start at `at` of `fields`: without their head, whole, and where they end.
local function cut(counts, run, fields, at, width)
  local high, low = byte(counts, 2 * run + 1, 2 * run + 2)
  local asked, members = {}, {}
  for j = 1, high * 256 + low do
    members[j] = sub(fields, at, at + width - 1)
    asked[j] = sub(fields, at + 8, at + width - 1)
    at = at + width
  end
  return asked, members, at
end
-- Everything in `segments` but what `owner` said and what has expired.
local function without(segments, owner, now)
  local kept, found, at = {}, 0, 1
  while at <= #segments do
    local length = byte(segments, at)
    local segment = sub(segments, at, at + 4 + length)
    if sub(segment, 9, 12) == owner then
      found = 1
    elseif tonumber(number(sub(segment, 2, 5))) > now then
      kept[#kept + 1] = segment
    end
    at = at + 5 + length
  end
  return kept, found
end
"""

LOOKUP = Script(
    _COMMON
    + """
-- KEYS: e, h, runs...   ARGV: epoch asked about, prefix of leases, bytes of a block key, bytes of a plain segment,
-- number of keys of each run (2 bytes each), block keys
local epoch = redis.call('GET', KEYS[1]) or '0'
local now = redis.call('TIME')[1]
if epoch ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then
  return {epoch, now, 0, '', ''}
end
local width, plain, counts, fields = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]
local found, owners, last, at, uniform, blocks = {}, {}, nil, 1, true, 0
for r = 3, #KEYS do
  local high, low = byte(counts, 2 * r - 5, 2 * r - 4)
  local asked = {}
  for j = 1, high * 256 + low do
    asked[j] = sub(fields, at + 8, at + width - 1)
    at = at + width
  end
  local run = redis.call('HMGET', KEYS[r], unpack(asked))
  local missing = false
  for j = 1, #run do
    local segments = run[j]
    if not segments then
      missing = true
      break
    end
    blocks = blocks + 1
    found[blocks] = segments
    if #segments == plain then
      local owner = sub(segments, 9, 12)
      if owner ~= last then
        owners[owner] = true
        last = owner
      end
    else
      uniform = false
      local s = 1
      while s <= #segments do
        owners[sub(segments, s + 8, s + 11)] = true
        s = s + 5 + byte(segments, s)
      end
    end
  end
  if missing then break end
end
local lengths = ''
if not uniform then
  local each = {}
  for j = 1, blocks do each[j] = #found[j] end
  lengths = table.concat(each, ',')
end
local reply = {epoch, now, blocks, table.concat(found), lengths}
for owner in pairs(owners) do
  reply[#reply + 1] = owner
  reply[#reply + 1] = redis.call('GET', ARGV[2] .. number(owner))
end
return reply
"""
)

ANNOUNCE = Script(
    _COMMON
    + """
-- KEYS: e, lease, index, runs...   ARGV: epoch, entries at most, seconds to live, owner, bytes of a block key,
-- number of keys of each run (2 bytes each), block keys, length of each record (1 byte each), records, who it is
-- Returns 1, or 0 (another epoch), -1 (no lease), -2 (too many entries); then nothing was changed.
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then return 0 end
if redis.call('GET', KEYS[2]) ~= ARGV[10] then return -1 end
local owner, width, counts, fields = ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
if redis.call('SCARD', KEYS[3]) + #fields / width > tonumber(ARGV[2]) then return -2 end
local now = tonumber(redis.call('TIME')[1])
local ttl = tonumber(ARGV[3]) + 1 -- this second has begun already
local e = now + ttl
local function octet(unit) return math.floor(e / unit) % 256 end
local expires = string.char(octet(16777216), octet(65536), octet(256), octet(1))
local lengths, records, at, rec, n = ARGV[8], ARGV[9], 1, 1, 0
for r = 4, #KEYS do
  local asked, members
  asked, members, at = cut(counts, r - 4, fields, at, width)
  local before = redis.call('HMGET', KEYS[r], unpack(asked))
  local pairs_ = {}
  for j = 1, #asked do
    n = n + 1
    local length = byte(lengths, n)
    local segment = string.char(length) .. expires .. sub(records, rec, rec + length - 1)
    rec = rec + length
    if before[j] then
      local kept = without(before[j], owner, now)
      while #kept >= """
    + str(OWNERS_PER_BLOCK_MAX)
    + """ do table.remove(kept, 1) end
      kept[#kept + 1] = segment
      segment = table.concat(kept)
    end
    pairs_[2 * j - 1] = asked[j]
    pairs_[2 * j] = segment
  end
  redis.call('HSET', KEYS[r], unpack(pairs_))
  redis.call('EXPIRE', KEYS[r], ttl)
  redis.call('SADD', KEYS[3], unpack(members))
end
redis.call('EXPIRE', KEYS[3], ttl)
return 1
"""
)

_REMOVE = """
-- Remove what `owner` said of `asked`, fields of the run `key`; return how many entries it had.
local function remove(key, asked, owner, now)
  local before = redis.call('HMGET', key, unpack(asked))
  local gone, rest, removed = {}, {}, 0
  for j = 1, #asked do
    if before[j] then
      local kept, found = without(before[j], owner, now)
      removed = removed + found
      if #kept == 0 then
        gone[#gone + 1] = asked[j]
      elseif found == 1 then
        rest[#rest + 1] = asked[j]
        rest[#rest + 1] = table.concat(kept)
      end
    end
  end
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
  if #rest > 0 then redis.call('HSET', key, unpack(rest)) end
  return removed
end
"""

WITHDRAW = Script(
    _COMMON
    + _REMOVE
    + """
-- KEYS: index, runs...   ARGV: owner, bytes of a block key, number of keys of each run (2 bytes each), block keys
local owner, width, counts, fields = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local now, at, removed = tonumber(redis.call('TIME')[1]), 1, 0
for r = 2, #KEYS do
  local asked, members
  asked, members, at = cut(counts, r - 2, fields, at, width)
  removed = removed + remove(KEYS[r], asked, owner, now)
  redis.call('SREM', KEYS[1], unpack(members))
end
return removed
"""
)

PURGE = Script(
    _COMMON
    + _REMOVE
    + """
-- Remove up to ARGV[3] entries of an owner. KEYS: index, lease (or nothing)   ARGV: prefix of runs, owner, limit
-- Returns how many it still has. The lease goes first: what is left is not served any more.
if KEYS[2] then redis.call('DEL', KEYS[2]) end
local now = tonumber(redis.call('TIME')[1])
local runs = {}
for _, member in ipairs(redis.call('SPOP', KEYS[1], tonumber(ARGV[3]))) do
  local head = sub(member, 1, 8)
  local fields = runs[head] or {}
  fields[#fields + 1] = sub(member, 9)
  runs[head] = fields
end
for head, fields in pairs(runs) do remove(ARGV[1] .. head, fields, ARGV[2], now) end
return redis.call('SCARD', KEYS[1])
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
    return b"kvm:{%b}:%b" % (digest.hex().encode(), b":".join((kind, *map(_text, parts))))


def owners_key(kind: bytes, *parts: bytes | int) -> bytes:
    """Return the name of a key in the owners' slot."""
    return b"kvm:{owners}:" + b":".join((kind, *map(_text, parts)))


def _text(part: bytes | int) -> bytes:
    return b"%d" % part if isinstance(part, int) else part
