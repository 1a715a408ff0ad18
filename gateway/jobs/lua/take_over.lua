-- now, lease, lease_ms, limit, foreign_ms, instance*  ->  {record, graph} of each job whose lease ran out, now leased to the caller
-- Jobs on instances that the caller does not name are left to those who know them, until their lease ran out foreign_ms ago.
local now, limit, taken, known = clock(ARGV[1]), tonumber(ARGV[4]), {}, {}
for i = 6, #ARGV do known[ARGV[i]] = true end
local due = limit > 0 and redis.call('ZRANGEBYSCORE', 'fluxgate:leases', '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1000) or {}
for i = 1, #due, 2 do
  if #taken >= limit then break end
  local id, key = due[i], job_key(due[i])
  if redis.call('EXISTS', key) == 0 then
    redis.call('ZREM', 'fluxgate:leases', id)
  elseif tonumber(due[i + 1]) <= now - tonumber(ARGV[5]) or known[redis.call('HGET', key, 'instance') or ''] then
    redis.call('HSET', key, 'lease', ARGV[2])
    redis.call('HINCRBY', key, 'revision', 1)
    if redis.call('HDEL', key, 'released') == 0 then redis.call('HINCRBY', key, 'takeovers', 1) end
    redis.call('ZADD', 'fluxgate:leases', now + tonumber(ARGV[3]), id)
    taken[#taken + 1] = {redis.call('HGETALL', key), redis.call('GET', 'fluxgate:graph:' .. id)}
  end
end
return taken
