-- now, id, ttl_s  ->  {ids of its jobs that have not ended}; what was no job yet never becomes one
local now, id, key = clock(ARGV[1]), ARGV[2], batch_key(ARGV[2])
local facts = redis.call('HMGET', key, 'ended_ms', 'total')
if facts[1] or not facts[2] then return {} end
redis.call('HSET', key, 'canceled', 1, 'fed', facts[2])
local states = string.gsub(redis.call('GET', key .. ':states'), '%.', 'c')
redis.call('SET', key .. ':states', states)
end_batch_if_done(id, now, ARGV[3])
return redis.call('SMEMBERS', key .. ':live')
