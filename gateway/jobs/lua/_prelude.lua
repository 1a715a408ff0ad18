-- Shared by every script: the clock, the keys, and the one way an event is written.
-- Redis's own clock decides about leases, so hosts whose clocks differ agree; tests pass a time instead.
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function job_key(id) return 'fluxgate:job:' .. id end
local function queue_key(priority, caller) return 'fluxgate:queue:' .. priority .. ':' .. caller end
local function callers_key(priority) return 'fluxgate:callers:' .. priority end
-- Trainings are leased by workers, generations by dispatchers: neither takes over the other's.
local function leases_key(kind) return kind == 'training' and 'fluxgate:leases:training' or 'fluxgate:leases' end
local function slots_key(instance) return 'fluxgate:slots:' .. instance end

-- The live feed is read by every process; the job's own stream is what replays. Both carry the same id.
local FEED_LENGTH, STREAM_LENGTH = 50000, 20000
local function emit(id, kind, status, data, keep)
  local event = redis.call('XADD', 'fluxgate:feed', 'MAXLEN', '~', FEED_LENGTH, '*', 'j', id, 'k', kind, 's', status, 'd', data)
  if keep then
    redis.call('XADD', 'fluxgate:events:' .. id, 'MAXLEN', '~', STREAM_LENGTH, event, 'k', kind, 's', status, 'd', data)
  end
  return event
end

-- Callers take turns within a priority: `callers` orders them by the turn they were last served in.
local function enqueue(id, priority, caller, sequence, deadline)
  deadline = deadline or redis.call('HGET', job_key(id), 'queue_deadline')
  if deadline then redis.call('ZADD', 'fluxgate:deadlines', deadline, id) end
  redis.call('ZADD', queue_key(priority, caller), sequence, id)
  redis.call('ZADD', callers_key(priority), 'NX', redis.call('GET', 'fluxgate:turn') or 0, caller)
  redis.call('ZADD', 'fluxgate:queued', sequence, id)
end

-- Whether more of the caller's wait. `queued` is left to whoever calls: it says whether the job stood in line at all.
local function dequeue(id, priority, caller)
  redis.call('ZREM', 'fluxgate:deadlines', id)
  local queue = queue_key(priority, caller)
  redis.call('ZREM', queue, id)
  if redis.call('EXISTS', queue) == 1 then return true end
  redis.call('ZREM', callers_key(priority), caller)
  return false
end

local function is_terminal(status)
  return status == 'succeeded' or status == 'failed' or status == 'canceled' or status == 'expired'
end

-- Jobs that asked for what this one was making: after a success all of them find it in the cache, else the first tries for itself.
local function release_followers(id, succeeded)
  local waiting = 'fluxgate:followers:' .. id
  local leader = nil
  local followers = redis.call('ZRANGE', waiting, 0, -1)
  for _, follower in ipairs(followers) do
    local facts = redis.call('HMGET', job_key(follower), 'status', 'priority', 'caller', 'sequence', 'twin')
    if facts[1] == 'queued' then
      if succeeded or not leader then
        leader = follower
        if not succeeded then redis.call('SET', 'fluxgate:twin:' .. facts[5], follower) end
        enqueue(follower, facts[2], facts[3], facts[4])
        emit(follower, 'wake', 'queued', '', false)
      else
        redis.call('ZADD', 'fluxgate:followers:' .. leader, facts[4], follower)
      end
    end
  end
  if #followers > 0 then redis.call('DEL', waiting) end
end

local function batch_key(id) return 'fluxgate:batch:' .. id end

-- An item becomes a job: the next to become one stands behind it.
local function join_batch(id, batch, index)
  local key = batch_key(batch)
  redis.call('HSET', job_key(id), 'batch', batch, 'batch_index', index)
  redis.call('HINCRBY', key, 'fed', 1)
  redis.call('SETRANGE', key .. ':states', index, 'q')
  redis.call('SADD', key .. ':live', id)
end

-- A batch whose items were all handed out and have all ended.
local function end_batch_if_done(batch, now, ttl_s)
  local key = batch_key(batch)
  local facts = redis.call('HMGET', key, 'fed', 'total', 'caller', 'ended_ms')
  if facts[4] or not facts[1] or tonumber(facts[1]) < tonumber(facts[2]) or redis.call('EXISTS', key .. ':live') == 1 then return end
  redis.call('HSET', key, 'ended_ms', now)
  redis.call('ZREM', 'fluxgate:batches', batch)
  redis.call('SREM', 'fluxgate:open_batches:' .. facts[3], batch)
  for _, name in ipairs({key, key .. ':states', key .. ':items'}) do redis.call('EXPIRE', name, ttl_s) end
end

-- An item's job ended: its letter stays with the batch, whatever becomes of the job's record.
local function leave_batch(id, batch, index, status, now, ttl_s)
  local key, letters = batch_key(batch), {succeeded = 's', failed = 'f', canceled = 'c', expired = 'x'}
  redis.call('SREM', key .. ':live', id)
  if redis.call('EXISTS', key) == 0 then return end
  redis.call('SETRANGE', key .. ':states', index, letters[status])
  end_batch_if_done(batch, now, ttl_s)
end

local function usage_key(caller, now) return 'fluxgate:usage:' .. caller .. ':' .. math.floor(now / 86400000) end

-- Why a caller may have no further job now: by its own limits where a key gave it some, else by the deployment's. 0 GPU seconds: any number.
local function refuse(caller, given_clock, most_jobs, most_gpu_s)
  local own = redis.call('HMGET', 'fluxgate:limits:' .. caller, 'jobs_in_flight', 'gpu_seconds_per_day')
  local active, jobs, gpu_s = redis.call('SCARD', 'fluxgate:active:' .. caller), tonumber(own[1] or most_jobs), tonumber(own[2] or most_gpu_s)
  if active >= jobs then return {'caller_full', active, jobs} end
  if gpu_s == 0 then return nil end
  local used_ms = tonumber(redis.call('HGET', usage_key(caller, clock(given_clock)), 'gpu_ms') or 0)
  if used_ms >= gpu_s * 1000 then return {'gpu_spent', math.floor(used_ms / 1000), gpu_s} end
end

-- What a job that ends used: the time ComfyUI or the trainer had it, by its last attempt. gateway/callers/usage.py reads these.
local function count_usage(id, caller, status, now, metrics, cached, started_ms)
  local place, taken = usage_key(caller, now), metrics and cjson.decode(metrics).execution_ms
  if type(taken) ~= 'number' then taken = started_ms and math.max(0, now - started_ms) or 0 end
  -- Whichever comes first on a day makes the key.
  if redis.call('HINCRBY', place, 'jobs_' .. status, 1) == 1 then redis.call('EXPIRE', place, 40 * 86400) end
  -- An import waits for the network, not for a GPU.
  if taken > 0 and cached ~= 'true' and string.sub(id, 1, 4) ~= 'imp_' then redis.call('HINCRBY', place, 'gpu_ms', math.floor(taken)) end
end

-- Every way a job ends, once its record says so: nothing is left that could claim, renew or count it; the record lives on for `ttl_s`.
local function close(id, now, ttl_s, succeeded)
  local key = job_key(id)
  local facts = redis.call('HMGET', key, 'instance', 'caller', 'twin', 'webhook', 'batch', 'batch_index', 'status', 'kind',
    'metrics', 'cached', 'started_ms')
  if facts[1] then redis.call('SREM', slots_key(facts[1]), id) end
  redis.call('ZREM', leases_key(facts[8]), id)
  redis.call('ZREM', 'fluxgate:deadlines', id)
  redis.call('SREM', 'fluxgate:active:' .. facts[2], id)
  -- Where an imported file came from may hold a key of its sender's.
  redis.call('HDEL', key, 'lease', 'source')
  if facts[3] then
    if redis.call('GET', 'fluxgate:twin:' .. facts[3]) == id then redis.call('DEL', 'fluxgate:twin:' .. facts[3]) end
    release_followers(id, succeeded)
  end
  count_usage(id, facts[2], facts[7], now, facts[9], facts[10], facts[11])
  if facts[4] then redis.call('ZADD', 'fluxgate:webhooks', now, id) end
  if facts[5] then leave_batch(id, facts[5], facts[6], facts[7], now, ttl_s) end
  for _, name in ipairs({key, 'fluxgate:graph:' .. id, 'fluxgate:events:' .. id}) do redis.call('EXPIRE', name, ttl_s) end
end

-- The jobs of a set by time whose time has come, earliest first; nobody else is given them for `pause_ms`. Those without a record are dropped.
local function take_due(set, now, pause_ms, limit)
  local found = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', set, '-inf', now, 'LIMIT', 0, tonumber(limit))) do
    if redis.call('EXISTS', job_key(id)) == 1 then
      redis.call('ZADD', set, now + tonumber(pause_ms), id)
      found[#found + 1] = id
    else
      redis.call('ZREM', set, id)
    end
  end
  return found
end
