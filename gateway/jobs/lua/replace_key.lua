-- A key's record in place of the one that was read, and its caller's limits with it; 0 when somebody was faster.
-- KEYS: keys, their version, the caller's limits. ARGV: prefix, record as read, new record, then pairs of limit and value ('' takes it away).
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
for place = 4, #ARGV, 2 do
  if ARGV[place + 1] == '' then
    redis.call('HDEL', KEYS[3], ARGV[place])
  else
    redis.call('HSET', KEYS[3], ARGV[place], ARGV[place + 1])
  end
end
redis.call('INCR', KEYS[2])
return 1
