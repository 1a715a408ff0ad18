-- now, id, lease, lease_ms  ->  the record, or {} when it has ended or another worker holds it
local now, id, key = clock(ARGV[1]), ARGV[2], job_key(ARGV[2])
local facts = redis.call('HMGET', key, 'status', 'lease')
if not facts[1] or is_terminal(facts[1]) then return {} end
if facts[2] and tonumber(redis.call('ZSCORE', 'fluxgate:leases:training', id) or 0) > now then return {} end
redis.call('HSET', key, 'lease', ARGV[3])
redis.call('HSETNX', key, 'claimed_ms', now)
-- Handed back in order: going on with it is no further attempt.
if redis.call('HDEL', key, 'released') == 0 then redis.call('HINCRBY', key, 'attempts', 1) end
redis.call('HINCRBY', key, 'revision', 1)
redis.call('ZADD', 'fluxgate:leases:training', now + tonumber(ARGV[4]), id)
return redis.call('HGETALL', key)
