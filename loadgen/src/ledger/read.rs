//! Reading a ledger back.
