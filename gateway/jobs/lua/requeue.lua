-- id, lease, instances to avoid as JSON, event  ->  the status now, or 'lost'
-- The job keeps its place in line; a job being canceled is not requeued.
local id, key = ARGV[1], job_key(ARGV[1])
local facts = redis.call('HMGET', key, 'lease', 'status', 'instance', 'priority', 'caller', 'sequence')
if facts[1] ~= ARGV[2] then return 'lost' end
if facts[2] == 'canceling' then return 'canceling' end
if facts[3] then redis.call('SREM', slots_key(facts[3]), id) end
redis.call('ZREM', 'fluxgate:leases', id)
redis.call('HDEL', key, 'lease', 'instance', 'prompt_id', 'started_ms', 'progress', 'write')
redis.call('HSET', key, 'status', 'queued', 'avoid', ARGV[3])
redis.call('HINCRBY', key, 'revision', 1)
enqueue(id, facts[4], facts[5], facts[6])
emit(id, 'status', 'queued', ARGV[4], true)
return 'queued'
