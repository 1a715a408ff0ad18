-- now, id, caller, priority, created_ms, spec, graph, event, queue deadline, twin, may be answered by a twin's work ('1'), depth limit,
-- caller limit, idempotency key, body hash, idempotency ttl_s, created_ms of the oldest records there can be,
-- webhook or '', batch or '', index in it, GPU seconds a day or 0
--   ->  {'created'} · {'following', leader} · {'cached', job id} (nothing stored yet) · {'replay', body hash, job id}
--       · {'queue_full', depth} · {'caller_full', jobs, limit} · {'gpu_spent', seconds, limit}
--       · {'stale'}: another item of the batch is next, or none
-- One step: either all of it happened or none, so a retry after a lost answer finds what the first try did.
local id, caller, priority = ARGV[2], ARGV[3], ARGV[4]
local key, twin, reuse, idempotency = job_key(id), ARGV[10], ARGV[11] == '1', ARGV[14]
if redis.call('EXISTS', key) == 1 then return {'created'} end
if idempotency ~= '' then
  local known = redis.call('HMGET', idempotency, 'hash', 'job')
  if known[1] then return {'replay', known[1], known[2]} end
end
local batch = ARGV[19]
if batch ~= '' and redis.call('HGET', batch_key(batch), 'fed') ~= ARGV[20] then return {'stale'} end
if twin ~= '' and reuse then
  local source = redis.call('GET', 'fluxgate:cache:' .. twin)
  if source then return {'cached', source} end
end
local depth = redis.call('ZCARD', 'fluxgate:queued')
if depth >= tonumber(ARGV[12]) then return {'queue_full', depth} end
local refused = refuse(caller, ARGV[1], ARGV[13], ARGV[21])
if refused then return refused end

if idempotency ~= '' then
  redis.call('HSET', idempotency, 'hash', ARGV[15], 'job', id)
  redis.call('EXPIRE', idempotency, ARGV[16])
end
local sequence = redis.call('INCR', 'fluxgate:sequence')
redis.call('HSET', key, 'spec', ARGV[6], 'status', 'queued', 'caller', caller, 'priority', priority,
  'sequence', sequence, 'attempts', 0, 'revision', 0, 'queue_deadline', ARGV[9],
  unpack(twin == '' and {} or {'twin', twin, 'reuse', ARGV[11]}))
if ARGV[18] ~= '' then redis.call('HSET', key, 'webhook', ARGV[18]) end
if batch ~= '' then join_batch(id, batch, ARGV[20]) end
redis.call('SET', 'fluxgate:graph:' .. id, ARGV[7])
for _, index in ipairs({'fluxgate:jobs', 'fluxgate:jobs:' .. caller}) do
  redis.call('ZADD', index, ARGV[5], id)
  -- Records that old have expired: their places in the lists go with them, now and then.
  if string.sub(id, -1) == '0' then redis.call('ZREMRANGEBYSCORE', index, '-inf', ARGV[17]) end
end
redis.call('SADD', 'fluxgate:active:' .. caller, id)

local leader = nil
if twin ~= '' then
  leader = reuse and redis.call('GET', 'fluxgate:twin:' .. twin)
  if leader and is_terminal(redis.call('HGET', job_key(leader), 'status') or 'expired') then leader = nil end
end
if leader then
  redis.call('ZADD', 'fluxgate:followers:' .. leader, sequence, id)
  -- It does not stand in line, but its time to wait is its own.
  redis.call('ZADD', 'fluxgate:deadlines', ARGV[9], id)
else
  if twin ~= '' then redis.call('SET', 'fluxgate:twin:' .. twin, id) end
  enqueue(id, priority, caller, sequence, ARGV[9])
end
emit(id, 'status', 'queued', ARGV[8], true)
return leader and {'following', leader} or {'created'}
