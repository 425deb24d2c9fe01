-- Visits of limited links that an instance may answer from its memory. They are counted in link_quotas.used already; what
-- is left is given back when the row is deleted. A row past its time is of an instance that died, or is cut off: it stays
-- until the link is used up, so that one that comes back can still give back.
CREATE TABLE quota_leases (
  link_id    bigint NOT NULL REFERENCES links (id) ON DELETE CASCADE,
  lease      bigint NOT NULL,             -- drawn by whoever holds it
  granted    bigint NOT NULL,
  expires_at timestamptz NOT NULL,        -- by this server's clock
  PRIMARY KEY (link_id, lease)
);
