-- id  ->  {record, a letter for each item, (id, status)* of those that are jobs now}, or {} when there is none
local key = batch_key(ARGV[1])
local record = redis.call('HGETALL', key)
if #record == 0 then return {} end
local live = {}
for _, id in ipairs(redis.call('SMEMBERS', key .. ':live')) do
  live[#live + 1] = id
  live[#live + 1] = redis.call('HGET', job_key(id), 'status') or 'expired'
end
return {record, redis.call('GET', key .. ':states') or '', live}
