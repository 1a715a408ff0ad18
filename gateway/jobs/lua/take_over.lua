-- now, lease, lease_ms, limit  ->  {record, graph} of each job whose lease ran out, now leased to the caller
local now, taken = clock(ARGV[1]), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'fluxgate:leases', '-inf', now, 'LIMIT', 0, tonumber(ARGV[4]))) do
  local key = job_key(id)
  if redis.call('EXISTS', key) == 1 then
    redis.call('HSET', key, 'lease', ARGV[2])
    redis.call('HINCRBY', key, 'revision', 1)
    if redis.call('HDEL', key, 'released') == 0 then redis.call('HINCRBY', key, 'takeovers', 1) end
    redis.call('ZADD', 'fluxgate:leases', now + tonumber(ARGV[3]), id)
    taken[#taken + 1] = {redis.call('HGETALL', key), redis.call('GET', 'fluxgate:graph:' .. id)}
  else
    redis.call('ZREM', 'fluxgate:leases', id)
  end
end
return taken
