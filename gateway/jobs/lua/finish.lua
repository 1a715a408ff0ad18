-- now, id, lease, status, ttl_s, cache ttl_s, number of fields, (field, value)*, (kind, status, data)*
--   ->  1, or 0 when it is not the caller's to end
local now, id = clock(ARGV[1]), ARGV[2]
local facts = redis.call('HMGET', job_key(id), 'lease', 'status', 'twin', 'ended_by', 'revision')
-- Sent twice over a broken connection: the first one counted.
if facts[4] == ARGV[3] and facts[2] == ARGV[4] then return 1 end
if facts[1] ~= ARGV[3] or is_terminal(facts[2]) then return 0 end
local count = tonumber(ARGV[7])
redis.call('HSET', job_key(id), 'status', ARGV[4], 'ended_by', ARGV[3], 'finished_ms', now, 'revision', facts[5] + 1,
  unpack(ARGV, 8, 7 + count * 2))
for i = 8 + count * 2, #ARGV, 3 do emit(id, ARGV[i], ARGV[i + 1], ARGV[i + 2], true) end
local succeeded = ARGV[4] == 'succeeded'
if succeeded and facts[3] and tonumber(ARGV[6]) > 0 then
  redis.call('SET', 'fluxgate:cache:' .. facts[3], id, 'EX', ARGV[6])
end
close(id, now, ARGV[5], succeeded)
return 1
