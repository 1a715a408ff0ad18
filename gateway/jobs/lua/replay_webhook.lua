-- now, id  ->  'due' · 'living' (it has not ended) · 'silent' (nobody is to be told) · '' (unknown)
local facts = redis.call('HMGET', job_key(ARGV[2]), 'status', 'webhook')
if not facts[1] then return '' end
if not facts[2] then return 'silent' end
if not is_terminal(facts[1]) then return 'living' end
redis.call('HDEL', job_key(ARGV[2]), 'webhook_tries')
redis.call('ZADD', 'fluxgate:webhooks', clock(ARGV[1]), ARGV[2])
return 'due'
