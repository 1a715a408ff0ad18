-- id, lease, write number, free_slot, number of fields, (field, value)*, (kind, status, data)*
--   ->  the status now, or 'lost' when the lease is somebody else's (then nothing is written)
-- A write whose number was seen already came twice over a broken connection and changes nothing. A job that is being canceled stays so: a status of the writer's is dropped then, with its event.
local id, key = ARGV[1], job_key(ARGV[1])
local facts = redis.call('HMGET', key, 'lease', 'status', 'instance', 'write')
if facts[1] ~= ARGV[2] then return 'lost' end
local write = ARGV[2] .. ':' .. ARGV[3]
if facts[4] == write then return facts[2] end
redis.call('HSET', key, 'write', write)
if ARGV[4] == '1' and facts[3] then redis.call('SREM', slots_key(facts[3]), id) end
local canceling, count = facts[2] == 'canceling', tonumber(ARGV[5])
for i = 6, 5 + count * 2, 2 do
  if not (canceling and ARGV[i] == 'status') then redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
redis.call('HINCRBY', key, 'revision', 1)
for i = 6 + count * 2, #ARGV, 3 do
  if not (canceling and ARGV[i] == 'status') then
    emit(id, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i] ~= 'preview')
  end
end
return redis.call('HGET', key, 'status')
