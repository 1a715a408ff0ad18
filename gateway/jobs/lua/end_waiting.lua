-- now, id, revision, ttl_s, status if it waits, event then, error then (JSON or ''), event if it is leased ('' leaves it alone)
--   ->  the status now, '' when unknown, 'stale' when it moved since it was read
local now, id, key = clock(ARGV[1]), ARGV[2], job_key(ARGV[2])
local facts = redis.call('HMGET', key, 'status', 'lease', 'revision', 'priority', 'caller', 'twin')
if not facts[1] then return '' end
if is_terminal(facts[1]) or facts[1] == 'canceling' then return facts[1] end
if facts[3] ~= ARGV[3] then return 'stale' end
if facts[2] then
  if ARGV[8] == '' then return facts[1] end
  redis.call('HSET', key, 'status', 'canceling')
  redis.call('HINCRBY', key, 'revision', 1)
  emit(id, 'status', 'canceling', ARGV[8], true)
  return 'canceling'
end
if facts[4] then
  redis.call('ZREM', 'fluxgate:queued', id)
  dequeue(id, facts[4], facts[5])
end
redis.call('HSET', key, 'status', ARGV[5], 'finished_ms', now, 'revision', facts[3] + 1)
if ARGV[7] ~= '' then
  redis.call('HSET', key, 'error', ARGV[7])
  emit(id, 'error', '', ARGV[7], true)
end
emit(id, 'status', ARGV[5], ARGV[6], true)
close(id, now, ARGV[4], false)
return ARGV[5]
