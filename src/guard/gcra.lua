-- The twin of gcra() in limits.rs, for callers of several instances. Whoever runs it puts lines before it that set
-- now, interval (both in microseconds) and burst. Numbers are doubles, exact up to 2^53: until the year 2255.
-- KEYS[1] holds the theoretical arrival time. Returns it as it was found, within its bounds, and now: gcra() makes the
-- verdict of them.
local latest = now + interval * burst
-- pcall: a value of another type is no reason to fail; it is written over.
local tat = tonumber(redis.pcall('GET', KEYS[1]))
if not (tat and tat >= now) then tat = now end
if tat > latest then tat = latest end
local next = tat + interval
if next > latest then next = tat end
redis.call('SET', KEYS[1], string.format('%.0f', next), 'PX', string.format('%.0f', math.ceil((next - now) / 1000)))
return {tat, now}
