-- id  ->  1 when the record is gone, 0 when the job still lives, -1 when there was none
local id, key = ARGV[1], job_key(ARGV[1])
local facts = redis.call('HMGET', key, 'status', 'caller')
if not facts[1] then return -1 end
if not is_terminal(facts[1]) then return 0 end
redis.call('DEL', key, 'fluxgate:graph:' .. id, 'fluxgate:events:' .. id)
redis.call('ZREM', 'fluxgate:jobs', id)
redis.call('ZREM', 'fluxgate:jobs:' .. facts[2], id)
redis.call('ZREM', 'fluxgate:trainings:' .. facts[2], id)
redis.call('ZREM', 'fluxgate:webhooks', id)
return 1
