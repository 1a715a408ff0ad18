-- now, lease_ms, limit  ->  the record of each job whose end is due to be told; nobody else is given it for `lease_ms`
local now, found = clock(ARGV[1]), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'fluxgate:webhooks', '-inf', now, 'LIMIT', 0, tonumber(ARGV[3]))) do
  local record = redis.call('HGETALL', job_key(id))
  if #record > 0 then
    redis.call('ZADD', 'fluxgate:webhooks', now + tonumber(ARGV[2]), id)
    found[#found + 1] = record
  else
    redis.call('ZREM', 'fluxgate:webhooks', id)
  end
end
return found
