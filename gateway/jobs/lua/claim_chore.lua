-- now, lease_ms  ->  id of a batch with something to do for, or ''; nobody else is told of it for `lease_ms`
local now = clock(ARGV[1])
local id = redis.call('ZRANGEBYSCORE', 'fluxgate:batch_chores', '-inf', now, 'LIMIT', 0, 1)[1]
if not id then return '' end
redis.call('ZADD', 'fluxgate:batch_chores', now + tonumber(ARGV[2]), id)
return id
