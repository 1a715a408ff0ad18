-- now, id, caller, created_ms, spec, graph, outputs as JSON, ttl_s, idempotency key, body hash, idempotency ttl_s, webhook or '',
-- batch or '', index in it, machine as JSON or '', (kind, status, data)*
--   ->  {'created'} · {'replay', body hash, job id} · {'stale'}: another item of the batch is next, or none
-- A job answered from the cache: it is over when it begins.
local now, id, caller = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = job_key(id)
if redis.call('EXISTS', key) == 1 then return {'created'} end
local batch = ARGV[13]
if batch ~= '' and redis.call('HGET', batch_key(batch), 'fed') ~= ARGV[14] then return {'stale'} end
if ARGV[9] ~= '' then
  local known = redis.call('HMGET', ARGV[9], 'hash', 'job')
  if known[1] then return {'replay', known[1], known[2]} end
  redis.call('HSET', ARGV[9], 'hash', ARGV[10], 'job', id)
  redis.call('EXPIRE', ARGV[9], ARGV[11])
end
redis.call('HSET', key, 'spec', ARGV[5], 'status', 'succeeded', 'caller', caller, 'cached', 'true', 'outputs', ARGV[7], 'attempts', 0, 'revision', 0,
  'finished_ms', now)
if ARGV[12] ~= '' then redis.call('HSET', key, 'webhook', ARGV[12]) end
if ARGV[15] ~= '' then redis.call('HSET', key, 'made_on', ARGV[15]) end
if batch ~= '' then join_batch(id, batch, ARGV[14]) end
redis.call('SET', 'fluxgate:graph:' .. id, ARGV[6])
redis.call('ZADD', 'fluxgate:jobs', ARGV[4], id)
redis.call('ZADD', 'fluxgate:jobs:' .. caller, ARGV[4], id)
for i = 16, #ARGV, 3 do emit(id, ARGV[i], ARGV[i + 1], ARGV[i + 2], true) end
close(id, now, ARGV[8], false)
return {'created'}
