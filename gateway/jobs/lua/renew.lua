-- now, lease_ms, (id, lease)*  ->  for each the job's status, or 'lost' when the lease is somebody else's
local now, answers = clock(ARGV[1]), {}
for i = 3, #ARGV, 2 do
  local facts = redis.call('HMGET', job_key(ARGV[i]), 'lease', 'status', 'kind')
  if facts[1] == ARGV[i + 1] then
    -- Handed back in order: who takes it over does not do so from the dead.
    if tonumber(ARGV[2]) < 0 then redis.call('HSET', job_key(ARGV[i]), 'released', 1) end
    redis.call('ZADD', leases_key(facts[3]), now + tonumber(ARGV[2]), ARGV[i])
    answers[#answers + 1] = facts[2]
  else
    answers[#answers + 1] = 'lost'
  end
end
return answers
