-- Visits of limited links that an instance may answer from its memory. They are counted in link_quotas.used already. Who
-- holds them deletes the row, and gives back what is left in the same step. A row past its time is of an instance that died,
-- or is cut off: it stays until nothing else is left of the link, or for a day, so that one that comes back can still give
-- back. When others delete it then, nothing is given back: what it held stays counted.
CREATE TABLE quota_leases (
  link_id    bigint NOT NULL REFERENCES links (id) ON DELETE CASCADE,
  lease      bigint NOT NULL,             -- drawn by whoever holds it
  granted    bigint NOT NULL,
  expires_at timestamptz NOT NULL,        -- by this server's clock
  PRIMARY KEY (link_id, lease)
);
