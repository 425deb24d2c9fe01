-- Links and everything that making and answering them needs. Times are milliseconds since 1970, UTC.

-- What was decided when the store was made: the alphabet of codes, the key of the permutation.
CREATE TABLE settings (
  name  TEXT PRIMARY KEY,
  value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- A domain keeps its number for ever; 0 is the default domain.
CREATE TABLE domains (
  id   INTEGER PRIMARY KEY CHECK (id BETWEEN 0 AND 65535),
  host TEXT NOT NULL UNIQUE
) STRICT;
INSERT INTO domains (id, host) VALUES (0, '');

CREATE TABLE links (
  id             INTEGER PRIMARY KEY,
  domain_id      INTEGER NOT NULL REFERENCES domains (id),
  code           TEXT NOT NULL,
  target_url     TEXT NOT NULL,           -- serialised, as it goes into Location
  target_written TEXT,                    -- as it was written; NULL: the same
  status         INTEGER,
  cache_control  TEXT,
  title          TEXT,
  note           TEXT,
  starts_at      INTEGER,
  expires_at     INTEGER,
  expired_url    TEXT,
  max_visits     INTEGER,
  forward_query  INTEGER,
  version        INTEGER NOT NULL,
  created_at     INTEGER NOT NULL,
  updated_at     INTEGER NOT NULL,
  disabled_at    INTEGER,
  deleted_at     INTEGER,
  UNIQUE (domain_id, code)
) STRICT;

CREATE TABLE tags (
  link_id INTEGER NOT NULL REFERENCES links (id) ON DELETE CASCADE,
  tag     TEXT NOT NULL,
  PRIMARY KEY (link_id, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX tags_by_tag ON tags (tag, link_id);

-- Visits that an import brought along.
CREATE TABLE link_totals (
  link_id  INTEGER PRIMARY KEY REFERENCES links (id) ON DELETE CASCADE,
  imported INTEGER NOT NULL
) STRICT;

-- Visits taken out of max_visits.
CREATE TABLE link_quotas (
  link_id INTEGER PRIMARY KEY REFERENCES links (id) ON DELETE CASCADE,
  used    INTEGER NOT NULL
) STRICT;

-- The version of the last change. A transaction that changes links updates it last, so that the order of
-- versions is the order of commits.
CREATE TABLE feed (
  one     INTEGER PRIMARY KEY CHECK (one = 1),
  version INTEGER NOT NULL
) STRICT;
INSERT INTO feed (one, version) VALUES (1, 0);

-- History, undo, and what servers follow to forget what they remember.
CREATE TABLE link_changes (
  version   INTEGER PRIMARY KEY,
  at        INTEGER NOT NULL,
  domain_id INTEGER NOT NULL,
  code      TEXT NOT NULL,
  what      TEXT NOT NULL,                -- create, replace, edit, disable, enable, delete, used_up
  before    TEXT                          -- JSON of the link before it; NULL: there was none
) STRICT;
CREATE INDEX link_changes_by_code ON link_changes (domain_id, code, version);

-- Numbers that servers lease a thousand at a time.
CREATE TABLE ranges (
  name TEXT PRIMARY KEY,
  next INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE api_keys (
  id           TEXT PRIMARY KEY,
  name         TEXT,
  digest       BLOB NOT NULL,             -- SHA-256 of the secret
  scopes       TEXT NOT NULL,
  per_minute   INTEGER,
  created_at   INTEGER NOT NULL,
  expires_at   INTEGER,
  revoked_at   INTEGER,
  last_used_at INTEGER
) STRICT, WITHOUT ROWID;
