-- What instances know of each other: where the feed stands, worker ids, what is to be in memory.

-- generation grows when the store was put back: versions and leased numbers may then come again.
-- asked grows with each request to warm and each change of the pins.
ALTER TABLE feed ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
-- It begins with chance: what two stores have left in one Redis is told apart by it.
ALTER TABLE feed ADD COLUMN asked INTEGER NOT NULL DEFAULT 0;
UPDATE feed SET generation = abs(random() % 140737488355328);

-- What an instance that starts, or has fallen behind, reads of the feed.
CREATE INDEX link_changes_edits ON link_changes (version) WHERE what <> 'create';

-- Worker ids of snowflakes. A lease is of milliseconds: whoever leases the id next begins past until_ms, so that
-- expires_at, which a clock decides, says only when somebody else may have the id.
CREATE TABLE worker_leases (
  worker_id  INTEGER PRIMARY KEY CHECK (worker_id BETWEEN 0 AND 1023),
  epoch      INTEGER NOT NULL,            -- grows each time that it is leased
  holder     TEXT NOT NULL,
  until_ms   INTEGER NOT NULL,            -- the last millisecond that was ever leased
  expires_at INTEGER NOT NULL
) STRICT;

-- Links that stay in every instance's memory.
CREATE TABLE pins (
  domain_id INTEGER NOT NULL,
  code      TEXT NOT NULL,
  PRIMARY KEY (domain_id, code)
) STRICT, WITHOUT ROWID;

-- Links that every instance is to load into its memory, once. Kept for a day.
CREATE TABLE warm_requests (
  number INTEGER PRIMARY KEY,             -- what feed.asked became
  at     INTEGER NOT NULL,
  what   TEXT NOT NULL                    -- JSON
) STRICT;

CREATE TABLE warm_reports (
  number   INTEGER NOT NULL,
  instance TEXT NOT NULL,
  loaded   INTEGER NOT NULL,
  missing  INTEGER NOT NULL,              -- codes that there are no links of
  at       INTEGER NOT NULL,
  PRIMARY KEY (number, instance)
) STRICT, WITHOUT ROWID;

CREATE TABLE instances (
  instance TEXT PRIMARY KEY,
  seen_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Names this store among all, for a move to another one.
INSERT INTO settings (name, value) VALUES ('store.id', CAST(lower(hex(randomblob(16))) AS BLOB));
