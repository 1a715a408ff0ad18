-- now, id, instance, lease, lease_ms, slots, prompt_id, base model, its LoRAs and those of recent jobs as JSON,
-- whether the asker has the record as it was made ('1'), (id, lease)* of jobs that left the instance
--   ->  {1, record, graph, job in the cache that made the same or ''} claimed · {2, now, the same job} claimed, and nothing else was written
--       since it was made · {0} no longer queued · {-1} the instance holds its share or drains
local now, id, instance = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = job_key(id)
for i = 12, #ARGV, 2 do
  if redis.call('HGET', job_key(ARGV[i]), 'lease') == ARGV[i + 1] then redis.call('SREM', slots_key(instance), ARGV[i]) end
end
local facts = redis.call('HMGET', key, 'status', 'priority', 'caller', 'lease', 'twin', 'reuse', 'attempts', 'revision', 'claimed_ms')
local source = facts[5] and facts[6] == '1' and redis.call('GET', 'fluxgate:cache:' .. facts[5]) or ''
-- Sent twice over a broken connection: the first one counted.
if facts[4] == ARGV[4] then return {1, redis.call('HGETALL', key), redis.call('GET', 'fluxgate:graph:' .. id), source} end
if facts[1] ~= 'queued' or facts[4] then return {0} end
-- What admins said counts at once, whether or not this dispatcher has heard it.
local wish = redis.call('HGET', 'fluxgate:fleet', instance)
if wish and (wish == 'removed' or cjson.decode(wish).draining) then return {-1} end
if redis.call('SCARD', slots_key(instance)) >= tonumber(ARGV[6]) then return {-1} end
-- A job that follows its twin does not stand in line, but keeps its time to wait.
if redis.call('ZREM', 'fluxgate:queued', id) == 0 then return {0} end
local more_wait, turn = dequeue(id, facts[2], facts[3]), redis.call('INCR', 'fluxgate:turn')
if more_wait then redis.call('ZADD', callers_key(facts[2]), turn, facts[3]) end
redis.call('HSET', key, 'lease', ARGV[4], 'instance', instance, 'prompt_id', ARGV[7], 'claimed_ms', facts[9] or now,
  'attempts', facts[7] + 1, 'revision', facts[8] + 1)
redis.call('ZADD', 'fluxgate:leases', now + tonumber(ARGV[5]), id)
redis.call('SADD', slots_key(instance), id)
redis.call('HSET', 'fluxgate:warm:' .. instance, 'base_model', ARGV[8], 'loras', ARGV[9], 'recent', ARGV[10])
if ARGV[11] == '1' and facts[8] == '0' then return {2, now, source} end
return {1, redis.call('HGETALL', key), redis.call('GET', 'fluxgate:graph:' .. id), source}
