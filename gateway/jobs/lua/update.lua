-- (id, lease, write number, free_slot, number of fields, number of events, (field, value)*, (kind, status, data)*)*
--   ->  for each job the status now, or 'lost' when the lease is somebody else's (then nothing of it is written)
-- Many jobs in one call, since a dispatcher that carries hundreds has news of many at a time; each is written or not by itself.
-- A write whose number was seen already came twice over a broken connection and changes nothing. A job that is being canceled stays so: a status of the writer's is dropped then, with its event.
local function update(at, fields_at, events_at, after)
  local id, key = ARGV[at], job_key(ARGV[at])
  local facts = redis.call('HMGET', key, 'lease', 'status', 'instance', 'write', 'revision')
  if facts[1] ~= ARGV[at + 1] then return 'lost' end
  local write = ARGV[at + 1] .. ':' .. ARGV[at + 2]
  if facts[4] == write then return facts[2] end
  if ARGV[at + 3] == '1' and facts[3] then redis.call('SREM', slots_key(facts[3]), id) end
  local canceling, status, fields = facts[2] == 'canceling', facts[2], {'write', write, 'revision', facts[5] + 1}
  for i = fields_at, events_at - 1, 2 do
    if not (canceling and ARGV[i] == 'status') then
      fields[#fields + 1], fields[#fields + 2] = ARGV[i], ARGV[i + 1]
      if ARGV[i] == 'status' then status = ARGV[i + 1] end
    end
  end
  redis.call('HSET', key, unpack(fields))
  for i = events_at, after - 1, 3 do
    if not (canceling and ARGV[i] == 'status') then
      emit(id, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i] ~= 'preview')
    end
  end
  return status
end

local answers, at = {}, 1
while at <= #ARGV do
  local fields_at = at + 6
  local events_at = fields_at + tonumber(ARGV[at + 4]) * 2
  local after = events_at + tonumber(ARGV[at + 5]) * 3
  answers[#answers + 1] = update(at, fields_at, events_at, after)
  at = after
end
return answers
