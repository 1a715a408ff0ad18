-- now, id, caller, priority, created_ms, spec, graph, event  ->  jobs queued now, or -1 when the id exists
local now, id, caller, priority = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', job_key(id)) == 1 then return -1 end
local sequence = redis.call('INCR', 'fluxgate:sequence')
redis.call('HSET', job_key(id), 'spec', ARGV[6], 'status', 'queued', 'caller', caller, 'priority', priority,
  'sequence', sequence, 'attempts', 0, 'revision', 0)
redis.call('SET', 'fluxgate:graph:' .. id, ARGV[7])
redis.call('ZADD', 'fluxgate:jobs', ARGV[5], id)
redis.call('ZADD', 'fluxgate:jobs:' .. caller, ARGV[5], id)
enqueue(id, priority, caller, sequence)
emit(id, 'status', 'queued', ARGV[8], true)
return redis.call('ZCARD', 'fluxgate:queued')
