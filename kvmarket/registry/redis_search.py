"""What the server does to find blocks: the longest prefix in one call, and single records that turned out to be stale.

Both look at every stretch that may hold one of the blocks asked for. They are named by the hashes of runs of keys,
each with consecutive indices; a stretch that starts before the first of them is found, too, as long as the run is not
very crowded.
"""

from __future__ import annotations

import struct

from kvmarket.registry.redis_link import Script

STRETCHES_ALL = 48
"""Up to so many stretches of a run are all looked at; of more, those that start at a block asked for."""
STRETCHES_ALL_INSIDE = 512
"""The same where the blocks asked for start inside a run, and with them what started before. In a run more crowded
than that such a look-up misses what started before its first block."""
PIECES_MAX = 64
"""Pieces of one run in an answer that do not make it longer: other owners to choose from."""

ASKED = struct.Struct(">IH")
"""One run of an `ASKED` table: index of its first block, number of blocks."""

_SEARCH = (
    """
local sub = string.sub
-- Call `take(field, segments, p, e)` for the segments of a run that may hold blocks asked for; the stretch starts at
-- asked block `p` (negative: before). `first`: index of the first block asked for; `hashes` from `base` on: of `n`.
local function search(key, first, n, hashes, base, width, take)
  local size = redis.call('HLEN', key)
  if size == 0 then return end
  local function each(field, segments, p)
    local at = 1
    while at <= #segments do
      at = at + take(field, segments, p, at)
    end
  end
  local inside = first % 32 ~= 0
  if size <= """
    + str(STRETCHES_ALL)
    + """ or (inside and size <= """
    + str(STRETCHES_ALL_INSIDE)
    + """) then
    local all = redis.call('HGETALL', key)
    for f = 1, #all, 2 do
      local field = all[f]
      local p = struct.unpack('>I4', field) - first
      if p < 0 or (p < n and sub(field, 5) == sub(hashes, base + p * width + 1, base + (p + 1) * width)) then
        each(field, all[f + 1], p)
      end
    end
    return
  end
  local fields = {}
  for p = 0, n - 1 do
    fields[p + 1] = struct.pack('>I4', first + p) .. sub(hashes, base + p * width + 1, base + (p + 1) * width)
  end
  for p, segments in ipairs(redis.call('HMGET', key, unpack(fields))) do
    if segments then each(fields[p], segments, p - 1) end
  end
end
"""
)

LOOKUP = Script(
    _SEARCH
    + """
-- KEYS: e, h, runs...   ARGV: epoch asked about, prefix of leases, bytes of a hash, ASKED of each run, hashes
-- Returns the epoch; where it is the one asked about, also where segments start (4 bytes each, signed, counted in
-- blocks asked for), the segments, and owners and their leases by turns. Hashes are chained: who has the last block of
-- some has them all. The asker compares them all.
local epoch = redis.call('GET', KEYS[1]) or '0'
if epoch ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then return {epoch} end
local now = tonumber(redis.call('TIME')[1])
local width, hashes, before = tonumber(ARGV[3]), ARGV[5], 0
local places, found, owners = {}, {}, {}
for r = 3, #KEYS do
  local first, n = struct.unpack('>I4I2', ARGV[4], 6 * (r - 3) + 1)
  local base, starts = before * width, {}
  search(KEYS[r], first, n, hashes, base, width, function(_, segments, p, at)
    local length, owner, expires, count, skip = struct.unpack('>I4c4I4I2I2', segments, at)
    local low, high = p < 0 and -p or 0, math.min(count, n - p) - 1
    if expires > now and low <= high then
      local function same(j)
        local there, here = at + 18 + (j - 1) * width, base + (p + j) * width
        return j == 0 or sub(segments, there, there + width - 1) == sub(hashes, here + 1, here + width)
      end
      if not same(high) then
        high = high - 1
        while low < high do
          local middle = math.ceil((low + high) / 2)
          if same(middle) then low = middle else high = middle - 1 end
        end
        if low > high or not same(high) then high = -1 end
      end
      if p < 0 and high < -p then high = -1 end
      local from = math.max(skip, p < 0 and -p or 0)
      if high >= from then
        local segment = length == #segments and segments or sub(segments, at, at + length - 1)
        local piece = {high + 1 - from, p, owner, segment}
        local here = starts[p + from]
        if here then here[#here + 1] = piece else starts[p + from] = {piece} end
      end
    end
    return length
  end)
  local reach, s, more = 0, 0, 0
  while s <= reach and s < n do
    for _, piece in ipairs(starts[s] or {}) do
      local longer = s + piece[1] > reach
      if longer then reach = s + piece[1] else more = more + 1 end
      if longer or more <= """
    + str(PIECES_MAX)
    + """ then
        places[#places + 1] = struct.pack('>i4', before + piece[2])
        found[#found + 1] = piece[4]
        owners[piece[3]] = true
      end
    end
    s = s + 1
  end
  before = before + reach
  if reach < n then break end
end
local leases = {}
for owner in pairs(owners) do
  leases[#leases + 1] = owner
  leases[#leases + 1] = redis.call('GET', ARGV[2] .. string.format('%.0f', struct.unpack('>I4', owner)))
end
return {epoch, table.concat(places), found, leases}
"""
)

DISCARD = Script(
    _SEARCH
    + """
-- Remove one record of one block where it is still exactly this. KEYS: run
-- ARGV: bytes of a hash, first index (4) and number (2) of the blocks asked for, hashes, owner, record
-- The last block asked for is the one. Its stretch stays under its key, in the parts before and after it.
local width, hashes, owner, record = tonumber(ARGV[1]), ARGV[3], ARGV[4], ARGV[5]
local first, n = struct.unpack('>I4I2', ARGV[2])
local todo = {}
search(KEYS[1], first, n, hashes, 0, width, function(field, segments, p, at)
  local length, who, expires, count, skip, bytes = struct.unpack('>I4c4I4I2I2I2', segments, at)
  local j = n - 1 - p -- the block in the stretch
  if who == owner and bytes == #record and j >= skip and j < count then
    local hash, named = at + 18 + (j - 1) * width, at + 18 + (count - 1) * width
    local here = named + (j - skip) * bytes
    if (j == 0 or sub(segments, hash, hash + width - 1) == sub(hashes, -width))
      and sub(segments, here, here + bytes - 1) == record then
      local parts, after = sub(segments, 1, at - 1), named + (count - skip) * bytes
      local function part(blocks, skipped, from, till)
        local named_bytes = (blocks - 1) * width
        parts = parts
          .. struct.pack('>I4c4I4I2I2I2', 18 + named_bytes + till - from, who, expires, blocks, skipped, bytes)
          .. sub(segments, at + 18, at + 17 + named_bytes) .. sub(segments, from, till - 1)
      end
      if j > skip then part(j, skip, named, here) end
      if j + 1 < count then part(count, j + 1, here + bytes, after) end
      todo[#todo + 1] = {field, parts .. sub(segments, at + length)}
    end
  end
  return length
end)
for _, change in ipairs(todo) do
  if change[2] == '' then redis.call('HDEL', KEYS[1], change[1])
  else redis.call('HSET', KEYS[1], change[1], change[2]) end
end
return #todo
"""
)
