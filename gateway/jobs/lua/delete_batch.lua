-- now, id  ->  1: it is gone for everybody but whoever clears it away · 0: it has not ended
local now, id, key = clock(ARGV[1]), ARGV[2], batch_key(ARGV[2])
local facts = redis.call('HMGET', key, 'ended_ms', 'caller')
if not facts[1] then return 0 end
redis.call('HSET', key, 'deleted', 1)
redis.call('ZREM', 'fluxgate:batches:' .. facts[2], id)
redis.call('ZADD', 'fluxgate:batch_chores', now, id)
return 1
