-- limit, instance*  ->  {ids that are next, callers taking turns within each priority}, then per instance {slots used, base model, LoRAs, LoRAs of recent jobs}
local limit, found = tonumber(ARGV[1]), {}
for _, priority in ipairs({'high', 'normal', 'low'}) do
  local queues = {}
  for _, caller in ipairs(redis.call('ZRANGE', callers_key(priority), 0, limit - 1)) do
    queues[#queues + 1] = redis.call('ZRANGE', queue_key(priority, caller), 0, limit - #found - 1)
  end
  local depth, more = 1, true
  while more and #found < limit do
    more = false
    for _, queue in ipairs(queues) do
      if queue[depth] and #found < limit then
        found[#found + 1] = queue[depth]
        more = true
      end
    end
    depth = depth + 1
  end
  if #found >= limit then break end
end
local answer = {found}
for i = 2, #ARGV do
  local warm = redis.call('HMGET', 'fluxgate:warm:' .. ARGV[i], 'base_model', 'loras', 'recent')
  answer[i] = {redis.call('SCARD', slots_key(ARGV[i])), warm[1] or '', warm[2] or '[]', warm[3] or '[]'}
end
return answer
