-- Visits and what is added up of them. Times are milliseconds since 1970, UTC; days are days since 1970.

-- Single visits, a partition a day. The index is on time alone: one on (link_id, at) would cost five times the COPY; it is
-- made once the day is over. There is no default partition: rows in it would block the day that they are of.
CREATE TABLE visits (
  link_id     bigint NOT NULL,
  at          bigint NOT NULL,
  epoch       bigint NOT NULL,            -- the start of the instance that saw it
  agent_id    bigint NOT NULL,            -- 0: none
  referrer_id bigint NOT NULL,            -- 0: none
  kind        smallint NOT NULL,          -- 0 click, 1 tool, 2 bot, 3 head, 4 prefetch
  address     inet,
  country     text,
  request_id  text
) PARTITION BY RANGE (at);
CREATE INDEX visits_by_time ON visits USING brin (at);

-- Visits of unknown and dead codes.
CREATE TABLE orphan_visits (
  domain_id   integer NOT NULL,
  code        text NOT NULL,
  at          bigint NOT NULL,
  epoch       bigint NOT NULL,
  agent_id    bigint NOT NULL,
  referrer_id bigint NOT NULL,
  address     inet,
  country     text,
  request_id  text
) PARTITION BY RANGE (at);
CREATE INDEX orphan_visits_by_time ON orphan_visits USING brin (at);

-- What agents and referrers say; an id is made of the text.
CREATE TABLE agents (
  id      bigint PRIMARY KEY,
  text    text NOT NULL,
  kind    smallint NOT NULL,
  browser text NOT NULL,                  -- '': unknown
  os      text NOT NULL,
  device  text NOT NULL
);
CREATE TABLE referrers (
  id   bigint PRIMARY KEY,
  text text NOT NULL,
  host text NOT NULL
);

-- Up to where the records of each core of each start are stored. Never deleted: whoever replays anything is told by them.
CREATE TABLE spool_positions (
  epoch    bigint NOT NULL,
  core     integer NOT NULL,
  instance text NOT NULL,
  next     bigint NOT NULL,               -- the number of the next record
  stored   bigint NOT NULL,               -- visits of links
  answered bigint NOT NULL,               -- as the instance said last
  at       bigint NOT NULL,               -- when
  PRIMARY KEY (epoch, core)
);
CREATE TABLE spool_drops (
  epoch  bigint NOT NULL,
  core   integer NOT NULL,
  reason text NOT NULL,
  visits bigint NOT NULL,
  PRIMARY KEY (epoch, core, reason)
);

-- Totals. A visit must not lock a row of links: no foreign key.
ALTER TABLE link_totals DROP CONSTRAINT link_totals_link_id_fkey;
ALTER TABLE link_totals ALTER COLUMN imported SET DEFAULT 0;
ALTER TABLE link_totals
  ADD COLUMN clicks     bigint NOT NULL DEFAULT 0,
  ADD COLUMN tools      bigint NOT NULL DEFAULT 0,
  ADD COLUMN bots       bigint NOT NULL DEFAULT 0,
  ADD COLUMN heads      bigint NOT NULL DEFAULT 0,
  ADD COLUMN prefetches bigint NOT NULL DEFAULT 0,
  ADD COLUMN first_at   bigint,           -- of clicks and tools
  ADD COLUMN last_at    bigint,
  ADD COLUMN sketch     bytea NOT NULL DEFAULT '';
CREATE TABLE link_days (
  link_id    bigint NOT NULL,
  day        integer NOT NULL,
  clicks     bigint NOT NULL,
  tools      bigint NOT NULL,
  bots       bigint NOT NULL,
  heads      bigint NOT NULL,
  prefetches bigint NOT NULL,
  last_at    bigint,
  sketch     bytea NOT NULL,              -- 15-minute buckets, top values, visitors: see stats::sketch
  PRIMARY KEY (link_id, day)
) WITH (fillfactor = 70);
