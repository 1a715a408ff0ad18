-- now, pause_ms, limit  ->  ids whose lease ran out; nobody else is told of them for `pause_ms`
local found = take_due('fluxgate:leases:training', clock(ARGV[1]), ARGV[2], ARGV[3])
for _, id in ipairs(found) do redis.call('HDEL', job_key(id), 'lease') end
return found
