-- Links and everything that making and answering them needs. Times are milliseconds since 1970, UTC.

-- What was decided when the store was made: the alphabet of codes, the key of the permutation.
CREATE TABLE settings (
  name  text PRIMARY KEY,
  value bytea NOT NULL
);

-- A domain keeps its number for ever; 0 is the default domain.
CREATE TABLE domains (
  id   integer PRIMARY KEY CHECK (id BETWEEN 0 AND 65535),
  host text NOT NULL UNIQUE
);
INSERT INTO domains (id, host) VALUES (0, '');

-- domain_id has no foreign key: domains are never deleted, and each insert would lock their one hot row.
CREATE TABLE links (
  id             bigint PRIMARY KEY,
  domain_id      integer NOT NULL,
  code           text NOT NULL,
  target_url     text NOT NULL,           -- serialised, as it goes into Location
  target_written text,                    -- as it was written; NULL: the same
  status         integer,
  cache_control  text,
  title          text,
  note           text,
  starts_at      bigint,
  expires_at     bigint,
  expired_url    text,
  max_visits     bigint,
  forward_query  boolean,
  version        bigint NOT NULL,
  created_at     bigint NOT NULL,
  updated_at     bigint NOT NULL,
  disabled_at    bigint,
  deleted_at     bigint,
  UNIQUE (domain_id, code)
);

CREATE TABLE tags (
  link_id bigint NOT NULL REFERENCES links (id) ON DELETE CASCADE,
  tag     text NOT NULL,
  PRIMARY KEY (link_id, tag)
);
CREATE INDEX tags_by_tag ON tags (tag, link_id);

-- Visits that an import brought along.
CREATE TABLE link_totals (
  link_id  bigint PRIMARY KEY REFERENCES links (id) ON DELETE CASCADE,
  imported bigint NOT NULL
);
CREATE INDEX link_totals_by_imported ON link_totals (imported DESC, link_id);

-- Visits taken out of max_visits.
CREATE TABLE link_quotas (
  link_id bigint PRIMARY KEY REFERENCES links (id) ON DELETE CASCADE,
  used    bigint NOT NULL
);

-- One row. A transaction that changes links locks it first and updates it last, so that the order of versions is the
-- order of commits, and no version is left out.
CREATE TABLE feed (
  one        integer PRIMARY KEY CHECK (one = 1),
  version    bigint NOT NULL,             -- of the last change
  generation bigint NOT NULL,             -- grows when the store was put back or another server took over
  asked      bigint NOT NULL,             -- grows with each request to warm and each change of the pins
  timeline   text NOT NULL                -- of the write-ahead log, when it was last seen; '': never
);
-- The generation begins with chance: what two stores have left in one Redis is told apart by it.
INSERT INTO feed (one, version, generation, asked, timeline)
  VALUES (1, 0, floor(random() * 140737488355328)::bigint, 0, '');

-- History, undo, and what servers follow to forget what they remember.
CREATE TABLE link_changes (
  version   bigint PRIMARY KEY,
  at        bigint NOT NULL,
  domain_id integer NOT NULL,
  code      text NOT NULL,
  what      text NOT NULL,                -- create, replace, edit, disable, enable, delete, used_up
  before    text                          -- JSON of the link before it; NULL: there was none
);
-- Creations are left out: a link itself says when it was made.
CREATE INDEX link_changes_by_code ON link_changes (domain_id, code, version) WHERE what <> 'create';
CREATE INDEX link_changes_edits ON link_changes (version) WHERE what <> 'create';

-- Numbers that servers lease a thousand at a time.
CREATE TABLE ranges (
  name text PRIMARY KEY,
  next bigint NOT NULL
);

CREATE TABLE api_keys (
  id           text PRIMARY KEY,
  name         text,
  digest       bytea NOT NULL,            -- SHA-256 of the secret
  scopes       text NOT NULL,
  per_minute   bigint,
  created_at   bigint NOT NULL,
  expires_at   bigint,
  revoked_at   bigint,
  last_used_at bigint
);

-- Who makes snowflakes with which worker id. All of them are here from the start: to lease one is to update its row.
CREATE TABLE worker_leases (
  worker_id  integer PRIMARY KEY CHECK (worker_id BETWEEN 0 AND 1023),
  epoch      bigint NOT NULL,             -- grows with each lease
  holder     text NOT NULL,
  until_ms   bigint NOT NULL,             -- the last millisecond that was given to a holder
  expires_at timestamptz NOT NULL         -- by this server's clock
);
INSERT INTO worker_leases (worker_id, epoch, holder, until_ms, expires_at)
  SELECT n, 0, '', 0, TIMESTAMPTZ '1970-01-01 00:00:00+00' FROM generate_series(0, 1023) AS ids (n);

-- Links that every instance keeps in memory.
CREATE TABLE pins (
  domain_id integer NOT NULL,
  code      text NOT NULL,
  PRIMARY KEY (domain_id, code)
);

-- Links that every instance is to load, and what came of it.
CREATE TABLE warm_requests (
  number bigint PRIMARY KEY,              -- feed.asked
  at     bigint NOT NULL,
  what   text NOT NULL                    -- JSON
);
CREATE TABLE warm_reports (
  number   bigint NOT NULL,
  instance text NOT NULL,
  loaded   bigint NOT NULL,
  missing  bigint NOT NULL,
  at       bigint NOT NULL,
  PRIMARY KEY (number, instance)
);

CREATE TABLE instances (
  instance text PRIMARY KEY,
  seen_at  bigint NOT NULL
);
