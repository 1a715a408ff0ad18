-- now, lease_ms, limit  ->  the record of each job whose end is due to be told; nobody else is given it for `lease_ms`
local found = {}
for _, id in ipairs(take_due('fluxgate:webhooks', clock(ARGV[1]), ARGV[2], ARGV[3])) do
  found[#found + 1] = redis.call('HGETALL', job_key(id))
end
return found
