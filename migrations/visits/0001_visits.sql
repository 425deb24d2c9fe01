-- visits.db: visits and what is added up of them. Times are milliseconds since 1970, UTC; days are days since 1970.

CREATE TABLE visits (
  link_id     INTEGER NOT NULL,
  at          INTEGER NOT NULL,
  epoch       INTEGER NOT NULL,           -- the start of the instance that saw it
  agent_id    INTEGER NOT NULL,           -- 0: none
  referrer_id INTEGER NOT NULL,           -- 0: none
  kind        INTEGER NOT NULL,           -- 0 click, 1 tool, 2 bot, 3 head, 4 prefetch
  address     BLOB,                       -- 4 or 16 bytes
  country     TEXT,
  request_id  TEXT
) STRICT;

-- Visits of unknown and dead codes.
CREATE TABLE orphan_visits (
  domain_id   INTEGER NOT NULL,
  code        TEXT NOT NULL,
  at          INTEGER NOT NULL,
  epoch       INTEGER NOT NULL,
  agent_id    INTEGER NOT NULL,
  referrer_id INTEGER NOT NULL,
  address     BLOB,
  country     TEXT,
  request_id  TEXT
) STRICT;

-- What agents and referrers say; an id is made of the text. Deleted when no visit that is kept can have it.
CREATE TABLE agents (
  id      INTEGER PRIMARY KEY,
  text    TEXT NOT NULL,
  kind    INTEGER NOT NULL,
  browser TEXT NOT NULL,                  -- '': unknown
  os      TEXT NOT NULL,
  device  TEXT NOT NULL,
  seen_day INTEGER NOT NULL               -- when it was told last, at most once a day
) STRICT;
CREATE INDEX agents_by_day ON agents (seen_day);
CREATE TABLE referrers (
  id   INTEGER PRIMARY KEY,
  text TEXT NOT NULL,
  host TEXT NOT NULL,
  seen_day INTEGER NOT NULL
) STRICT;
CREATE INDEX referrers_by_day ON referrers (seen_day);

-- Up to where the records of each core of each start are stored. Never deleted: whoever replays anything is told by them.
CREATE TABLE spool_positions (
  epoch    INTEGER NOT NULL,
  core     INTEGER NOT NULL,
  instance TEXT NOT NULL,
  next     INTEGER NOT NULL,              -- the number of the next record
  stored   INTEGER NOT NULL,              -- visits of links
  answered INTEGER NOT NULL,              -- as the instance said last
  at       INTEGER NOT NULL,              -- when
  PRIMARY KEY (epoch, core)
) STRICT, WITHOUT ROWID;
CREATE TABLE spool_drops (
  epoch  INTEGER NOT NULL,
  core   INTEGER NOT NULL,
  reason TEXT NOT NULL,
  visits INTEGER NOT NULL,
  PRIMARY KEY (epoch, core, reason)
) STRICT, WITHOUT ROWID;

-- Totals; what an import brought along stands in waypost.db.
CREATE TABLE link_totals (
  link_id    INTEGER PRIMARY KEY,
  clicks     INTEGER NOT NULL,
  tools      INTEGER NOT NULL,
  bots       INTEGER NOT NULL,
  heads      INTEGER NOT NULL,
  prefetches INTEGER NOT NULL,
  first_at   INTEGER,                     -- of clicks and tools
  last_at    INTEGER,
  sketch     BLOB NOT NULL
) STRICT;
-- In the order of their coming, so that what one batch touches lies together; WITHOUT ROWID it would lie a page apiece, and
-- sketches of more than a kilobyte on pages of their own.
CREATE TABLE link_days (
  link_id    INTEGER NOT NULL,
  day        INTEGER NOT NULL,
  clicks     INTEGER NOT NULL,
  tools      INTEGER NOT NULL,
  bots       INTEGER NOT NULL,
  heads      INTEGER NOT NULL,
  prefetches INTEGER NOT NULL,
  last_at    INTEGER,
  sketch     BLOB NOT NULL,               -- 15-minute buckets, top values, visitors: see stats::sketch
  UNIQUE (link_id, day)
) STRICT;
