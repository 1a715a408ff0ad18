-- id  ->  jobs that will be served before this one if nobody else comes, or -1 when it does not wait
-- '', priority, caller  ->  the same for a job that this caller made now
local id = ARGV[1]
local facts = id == '' and {ARGV[2], ARGV[3]} or redis.call('HMGET', job_key(id), 'priority', 'caller')
if not facts[1] then return -1 end
local queue = queue_key(facts[1], facts[2])
local rank = id == '' and redis.call('ZCARD', queue) or redis.call('ZRANK', queue, id)
if not rank then return -1 end
local ahead = 0
for _, priority in ipairs({'high', 'normal', 'low'}) do
  local own = priority == facts[1]
  local before = true
  for _, caller in ipairs(redis.call('ZRANGE', callers_key(priority), 0, -1)) do
    if own and caller == facts[2] then
      ahead = ahead + rank
      before = false
    else
      local waiting = redis.call('ZCARD', queue_key(priority, caller))
      if own then waiting = math.min(waiting, before and rank + 1 or rank) end
      ahead = ahead + waiting
    end
  end
  if own then break end
end
return ahead
