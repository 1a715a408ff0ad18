-- now, id, caller, created_ms, spec, event, caller limit, idempotency key, body hash, idempotency ttl_s, webhook or '',
-- GPU seconds a day or 0, where an imported file comes from or ''
--   ->  {'created'} · {'replay', body hash, job id} · {'caller_full', jobs, limit} · {'gpu_spent', seconds, limit}
-- A training stands in the worker's queue, not in the dispatchers'. Until a worker claims it,
-- whoever looks for lost trainings sees it after a few seconds, so that a crash between here and that queue forgets nothing.
local now, id, caller, idempotency = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[8]
local key = job_key(id)
if redis.call('EXISTS', key) == 1 then return {'created'} end
if idempotency ~= '' then
  local known = redis.call('HMGET', idempotency, 'hash', 'job')
  if known[1] then return {'replay', known[1], known[2]} end
end
local refused = refuse(caller, ARGV[1], ARGV[7], ARGV[12])
if refused then return refused end
if idempotency ~= '' then
  redis.call('HSET', idempotency, 'hash', ARGV[9], 'job', id)
  redis.call('EXPIRE', idempotency, ARGV[10])
end
redis.call('HSET', key, 'spec', ARGV[5], 'kind', 'training', 'status', 'queued', 'caller', caller, 'attempts', 0, 'revision', 0)
if ARGV[11] ~= '' then redis.call('HSET', key, 'webhook', ARGV[11]) end
if ARGV[13] ~= '' then redis.call('HSET', key, 'source', ARGV[13]) end
redis.call('ZADD', 'fluxgate:trainings:' .. caller, ARGV[4], id)
redis.call('SADD', 'fluxgate:active:' .. caller, id)
redis.call('ZADD', 'fluxgate:leases:training', now + 5000, id)
emit(id, 'status', 'queued', ARGV[6], true)
return {'created'}
