-- Quotas as chorus/core/callers/quota.py decides them, atomically where several coordinators share one account.
-- KEYS[1]: the account, as JSON. ARGV: what to do, the time in ms (empty: this server's own), then by what is done:
--   take RESERVATION TOKENS RPM TPM TPD CONCURRENT TOTAL -> {} or {quota, limit, retry_ms or -1}
--   settle RESERVATION BEGUN PROMPT OUTPUT, renew RESERVATION... -> {}
local now = tonumber(ARGV[2])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local LEASE, MINUTE, DAY, CELLS = 30000, 60000, 86400000, 240
local WINDOWS = {
  {'r', 'requests_per_minute', MINUTE}, {'t', 'tokens_per_minute', MINUTE}, {'d', 'tokens_per_day', DAY},
}
local raw = redis.call('GET', KEYS[1])
local state = raw and cjson.decode(raw)
  or {r = {}, t = {}, d = {}, open = {}, requests = 0, tokens = 0, prompt = 0, output = 0}

local function cell_of(ms, length) return string.format('%d', math.floor(ms / (length / CELLS))) end

for _, w in ipairs(WINDOWS) do
  local kept, oldest = {}, math.floor((now - w[3]) / (w[3] / CELLS))
  for cell, n in pairs(state[w[1]]) do
    if tonumber(cell) >= oldest then kept[cell] = n end
  end
  state[w[1]] = kept
end
local open, open_count = {}, 0
for name, held in pairs(state.open) do
  if held[1] > now then
    open[name] = held
    open_count = open_count + 1
  end
end
state.open = open

local function window_refusal(w, limit, amount)
  if amount > limit then return {w[2], limit, -1} end
  local cells, excess = {}, amount - limit
  for cell, n in pairs(state[w[1]]) do
    cells[#cells + 1] = tonumber(cell)
    excess = excess + n
  end
  if excess <= 0 then return nil end
  table.sort(cells)
  for _, cell in ipairs(cells) do
    excess = excess - state[w[1]][string.format('%d', cell)]
    if excess <= 0 then return {w[2], limit, math.max(1, (cell + 1) * (w[3] / CELLS) + w[3] - now)} end
  end
  return {w[2], limit, w[3]}
end

local function refusal(tokens, limits, concurrent, total)
  if total > 0 and state.tokens + tokens > total then return {'total_tokens', total, -1} end
  local worst
  for i, w in ipairs(WINDOWS) do
    if limits[i] > 0 then
      local found = window_refusal(w, limits[i], w[1] == 'r' and 1 or tokens)
      if found and found[3] < 0 then return found end
      if found and (not worst or found[3] > worst[3]) then worst = found end
    end
  end
  if not worst and concurrent > 0 and open_count >= concurrent then return {'concurrent', concurrent, 500} end
  return worst
end

local answer = {}
if ARGV[1] == 'take' then
  local name, tokens = ARGV[3], tonumber(ARGV[4])
  if not open[name] then
    local limits = {tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])}
    answer = refusal(tokens, limits, tonumber(ARGV[8]), tonumber(ARGV[9])) or {}
    if #answer == 0 then
      for _, w in ipairs(WINDOWS) do
        local cell = cell_of(now, w[3])
        state[w[1]][cell] = (state[w[1]][cell] or 0) + (w[1] == 'r' and 1 or tokens)
      end
      state.requests = state.requests + 1
      state.tokens = state.tokens + tokens
      open[name] = {now + LEASE, tokens, now}
    end
  end
elseif ARGV[1] == 'settle' then
  local begun, prompt, output = ARGV[4] == '1', tonumber(ARGV[5]), tonumber(ARGV[6])
  local held = open[ARGV[3]]
  if held then
    open[ARGV[3]] = nil
    for _, w in ipairs(WINDOWS) do
      local change = prompt + output - held[2]
      if w[1] == 'r' then change = begun and 0 or -1 end
      local cell = cell_of(held[3], w[3])
      if state[w[1]][cell] then state[w[1]][cell] = state[w[1]][cell] + change end
    end
    state.requests = state.requests - (begun and 0 or 1)
    state.tokens = state.tokens + prompt + output - held[2]
    state.prompt = state.prompt + prompt
    state.output = state.output + output
  end
else
  for i = 3, #ARGV do
    if open[ARGV[i]] then open[ARGV[i]][1] = now + LEASE end
  end
end
redis.call('SET', KEYS[1], cjson.encode(state))
return answer
