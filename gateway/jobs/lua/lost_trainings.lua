-- now, pause_ms, limit  ->  ids whose lease ran out; nobody else is told of them for `pause_ms`
local now, found = clock(ARGV[1]), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'fluxgate:leases:training', '-inf', now, 'LIMIT', 0, tonumber(ARGV[3]))) do
  if redis.call('EXISTS', job_key(id)) == 1 then
    redis.call('ZADD', 'fluxgate:leases:training', now + tonumber(ARGV[2]), id)
    redis.call('HDEL', job_key(id), 'lease')
    found[#found + 1] = id
  else
    redis.call('ZREM', 'fluxgate:leases:training', id)
  end
end
return found
