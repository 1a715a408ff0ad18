-- now, id, revision, ttl_s, event if canceled, event if canceling  ->  the status now, '' when unknown, 'stale' when it moved since it was read
local now, id, key = clock(ARGV[1]), ARGV[2], job_key(ARGV[2])
local facts = redis.call('HMGET', key, 'status', 'lease', 'revision', 'priority', 'caller')
if not facts[1] then return '' end
if is_terminal(facts[1]) or facts[1] == 'canceling' then return facts[1] end
if facts[3] ~= ARGV[3] then return 'stale' end
redis.call('HINCRBY', key, 'revision', 1)
if facts[2] then
  redis.call('HSET', key, 'status', 'canceling')
  emit(id, 'status', 'canceling', ARGV[6], true)
  return 'canceling'
end
dequeue(id, facts[4], facts[5])
redis.call('HSET', key, 'status', 'canceled')
emit(id, 'status', 'canceled', ARGV[5], true)
close(id, now, ARGV[4])
return 'canceled'
