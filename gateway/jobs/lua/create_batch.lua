-- now, id, caller, created_ms, spec, number of items, webhook or '', caller limit, idempotency key, body hash, idempotency ttl_s,
-- created_ms of the oldest records there can be, items in packets*
--   ->  {'created'} · {'replay', body hash, batch id} · {'caller_full', batches}
local id, caller, idempotency = ARGV[2], ARGV[3], ARGV[9]
local key = batch_key(id)
if redis.call('EXISTS', key) == 1 then return {'created'} end
if idempotency ~= '' then
  local known = redis.call('HMGET', idempotency, 'hash', 'job')
  if known[1] then return {'replay', known[1], known[2]} end
end
local open = redis.call('SCARD', 'fluxgate:open_batches:' .. caller)
if open >= tonumber(ARGV[8]) then return {'caller_full', open} end
if idempotency ~= '' then
  redis.call('HSET', idempotency, 'hash', ARGV[10], 'job', id)
  redis.call('EXPIRE', idempotency, ARGV[11])
end
redis.call('HSET', key, 'spec', ARGV[5], 'caller', caller, 'total', ARGV[6], 'fed', 0)
if ARGV[7] ~= '' then redis.call('HSET', key, 'webhook', ARGV[7]) end
redis.call('SET', key .. ':states', string.rep('.', tonumber(ARGV[6])))
for i = 13, #ARGV do redis.call('HSET', key .. ':items', i - 13, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', 'fluxgate:batches:' .. caller, '-inf', ARGV[12])
redis.call('ZADD', 'fluxgate:batches:' .. caller, ARGV[4], id)
redis.call('SADD', 'fluxgate:open_batches:' .. caller, id)
redis.call('ZADD', 'fluxgate:batches', ARGV[4], id)
return {'created'}
