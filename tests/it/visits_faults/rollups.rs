//! `visits.raw = false`: each visit in the totals once, and in nothing else, also when the server was killed between.
//!
//! In: redirects that we received. Out: as many in all sums of the store and in the stats; no row of a single visit.
//! Never: a visit of an unknown code anywhere.

use super::disk::visit;
use super::{Kept, Stand};
use crate::campaign::Account;

#[test]
fn totals_without_single_visits() {
    for kept in [Kept::Embedded, Kept::Postgres] {
        let stand = Stand::new(kept, "[visits]\nraw = false\n");
        let server = stand.start();
        server.custom("spring26", "https://example.org/");
        let mut received = visit(&server, 0..300);
        server.kill();
        let server = stand.start();
        received += visit(&server, 200..500);
        assert_eq!(server.get("/no-such-code").status, 404);

        let account = Account::settled(&[&server]);
        assert_eq!((account.stored, account.dropped()), (received, 0), "{account:?}");
        for sum in
            ["clicks + tools) FROM link_totals", "clicks + tools) FROM link_days", "stored) FROM spool_positions"]
        {
            assert_eq!(stand.sql(&format!("SELECT sum({sum}")), received, "{sum} over {kept:?}");
        }
        for table in ["visits", "orphan_visits", "agents", "referrers"] {
            assert_eq!(stand.sql(&format!("SELECT count(*) FROM {table}")), 0, "{table} over {kept:?}");
        }
        assert_eq!(stand.place.json(&["stats", "spring26"])["total_clicks"], received, "{kept:?}");
        let exported = stand.place.run(&["export", "--visits"]);
        assert_eq!((exported.code, exported.out.lines().count()), (Some(0), 1), "{exported:?}");
        assert!(exported.err.contains("visits.raw") && exported.err.contains("waypost stats"), "{exported:?}");
    }
}
