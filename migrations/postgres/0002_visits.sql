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

-- What agents and referrers say; an id is made of the text. Deleted when no visit that is kept can have it.
CREATE TABLE agents (
  id      bigint PRIMARY KEY,
  text    text NOT NULL,
  kind    smallint NOT NULL,
  browser text NOT NULL,                  -- '': unknown
  os      text NOT NULL,
  device  text NOT NULL,
  seen_day integer NOT NULL               -- when it was told last, at most once a day and instance
);
CREATE INDEX agents_by_day ON agents (seen_day);
CREATE TABLE referrers (
  id   bigint PRIMARY KEY,
  text text NOT NULL,
  host text NOT NULL,
  seen_day integer NOT NULL
);
CREATE INDEX referrers_by_day ON referrers (seen_day);

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
-- Each batch updates rows: room for their new versions on the same page spares the indexes.
ALTER TABLE link_totals SET (fillfactor = 70);
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
-- Their bytes are dense already: to compress them would cost more than all the rest.
ALTER TABLE link_totals ALTER COLUMN sketch SET STORAGE EXTERNAL;
ALTER TABLE link_days ALTER COLUMN sketch SET STORAGE EXTERNAL;

-- Whoever stores visits owns nothing: what takes the owner is done by these, and nobody else may call them.

-- Makes the partitions of a day (days since 1970) that are not there. A stand-alone table that is attached does not stop
-- whoever writes, as CREATE TABLE ... PARTITION OF would; the CHECK spares the look through its rows.
CREATE FUNCTION add_visit_day(day integer) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  parent text;
  part text;
  from_ms bigint := day * 86400000::bigint;
  to_ms bigint := from_ms + 86400000;
BEGIN
  -- Of instances that miss the same day, one makes it and the others find it made.
  PERFORM pg_advisory_xact_lock(hashtext('waypost.add_visit_day'));
  FOREACH parent IN ARRAY ARRAY['visits', 'orphan_visits'] LOOP
    part := parent || to_char(DATE '1970-01-01' + day, '_YYYYMMDD');
    CONTINUE WHEN to_regclass(part) IS NOT NULL;
    EXECUTE format('CREATE TABLE %I (LIKE %I, CONSTRAINT day CHECK (at >= %s AND at < %s))',
      part, parent, from_ms, to_ms);
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%s) TO (%s)', parent, part, from_ms, to_ms);
    -- The bounds say the same, and each row would be checked twice.
    EXECUTE format('ALTER TABLE %I DROP CONSTRAINT day', part);
  END LOOP;
END $$;

-- Drops the oldest partition of a day before this one; false if there is none.
CREATE FUNCTION drop_visit_day(before integer) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  part text;
BEGIN
  SELECT c.relname INTO part FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent IN ('visits'::regclass, 'orphan_visits'::regclass)
      AND right(c.relname, 8) < to_char(DATE '1970-01-01' + before, 'YYYYMMDD')
    ORDER BY right(c.relname, 8) LIMIT 1;
  IF part IS NULL THEN
    RETURN false;
  END IF;
  EXECUTE format('DROP TABLE %I', part);
  RETURN true;
END $$;

-- Gives the oldest partition of a day before this one that lacks it the index by link; false if there is none, or
-- another instance is at it. Whoever stores a visit of that day meanwhile waits for it, up to their lock_timeout: call it
-- hours after the day.
CREATE FUNCTION index_visit_day(before integer) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  part text;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtext('waypost.index_visit_day')) THEN
    RETURN false;
  END IF;
  SELECT c.relname INTO part FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'visits'::regclass AND right(c.relname, 8) < to_char(DATE '1970-01-01' + before, 'YYYYMMDD')
      AND to_regclass(c.relname || '_by_link') IS NULL
    ORDER BY c.relname LIMIT 1;
  IF part IS NULL THEN
    RETURN false;
  END IF;
  EXECUTE format('CREATE INDEX %I ON %I (link_id, at)', part || '_by_link', part);
  RETURN true;
END $$;

-- They run with the owner's rights: what they call is found in this schema alone (PostgreSQL manual, CREATE FUNCTION,
-- "Writing SECURITY DEFINER Functions Safely").
DO $$
DECLARE
  function text;
BEGIN
  FOREACH function IN ARRAY ARRAY['add_visit_day', 'drop_visit_day', 'index_visit_day'] LOOP
    EXECUTE format('ALTER FUNCTION %I(integer) SET search_path = %I, pg_temp', function, current_schema());
    EXECUTE format('REVOKE ALL ON FUNCTION %I(integer) FROM PUBLIC', function);
  END LOOP;
END $$;
