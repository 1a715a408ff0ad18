-- now, id, the try as JSON, its number, pause_ms until the next ('' for none), tries kept in the log
-- One that another process has told meanwhile is not told again: it is no longer in the set.
local now, id, key = clock(ARGV[1]), ARGV[2], job_key(ARGV[2])
if redis.call('EXISTS', key) == 0 then return redis.call('ZREM', 'fluxgate:webhooks', id) end
local log = cjson.decode(redis.call('HGET', key, 'deliveries') or '[]')
log[#log + 1] = cjson.decode(ARGV[3])
while #log > tonumber(ARGV[6]) do table.remove(log, 1) end
redis.call('HSET', key, 'deliveries', cjson.encode(log), 'webhook_tries', ARGV[4])
if ARGV[5] == '' then return redis.call('ZREM', 'fluxgate:webhooks', id) end
return redis.call('ZADD', 'fluxgate:webhooks', 'XX', now + tonumber(ARGV[5]), id)
