//! What an error of Postgres means: to be tried again, to be put right by a person, or broken.
//!
//! In: errors of the driver and the pool. Out: [`Error`], with the server's own message and code.
//! Never: has a password in it: neither the driver nor the server repeats one.
//! At its limit: a code that is not listed is broken.
//!
//! Codes are SQLSTATEs (PostgreSQL manual, appendix A).

use std::error::Error as _;
use std::io;

use deadpool::managed::{PoolError, TimeoutType};
use tokio_postgres::Error as Failure;
use tokio_postgres::error::SqlState;

use crate::store::Error;

pub(crate) fn code(error: &Failure) -> Option<&str> {
    error.code().map(SqlState::code)
}

/// Whether the transaction may simply be sent once more: it met another one, and nothing of it was kept.
pub(super) fn is_conflict(error: &Failure) -> bool {
    matches!(code(error), Some("40001" | "40P01"))
}

/// Whether the connection is as good as before: it refused a statement, and nothing else happened.
pub(super) fn spares_connection(error: &Failure) -> bool {
    matches!(code(error).and_then(|code| code.get(..2)), Some("22" | "23" | "40" | "42"))
}

/// Whether it is the server's word about a statement, which then did nothing. A connection that is lost (class 08, a
/// pooler's word for it too) or was ended (57P0x) says nothing of what was sent on it.
pub(crate) fn refuses_statement(error: &Failure) -> bool {
    code(error).is_some_and(|code| !code.starts_with("08") && !code.starts_with("57P0"))
}

pub(crate) fn explain(error: &Failure) -> Error {
    let why = text(error);
    let Some(code) = code(error) else {
        let by_io = error.source().is_some_and(|cause| cause.is::<io::Error>());
        return match error.to_string().as_str() {
            // The driver has no other way to tell its kinds apart.
            "authentication error" if !by_io => Error::Schema(format!("postgres refused us: {why}")),
            "invalid configuration" => Error::Schema(format!("postgres.url: {why}")),
            _ if by_io || error.source().is_none() || error.is_closed() => Error::Unavailable(why),
            "error performing TLS handshake" => Error::Unavailable(why),
            _ => Error::Broken(why),
        };
    };
    match (code, &code[..2.min(code.len())]) {
        ("42P01" | "42703" | "42883" | "3F000", _) => {
            Error::Schema(format!("the store's schema is not this program's ({why}): run `waypost migrate`"))
        }
        ("42P07", _) => {
            Error::Schema(format!("another program uses the database ({why}): choose one of waypost's own"))
        }
        ("26000" | "42P05", _) => Error::Schema(format!(
            "a pooler gave us another connection ({why}): set postgres.statements to \"unnamed\""
        )),
        ("42501", _) => {
            Error::Schema(format!("the role may not ({why}): run `waypost migrate --grants ROLE` as the tables' owner"))
        }
        ("3D000", _) => Error::Schema(format!("there is no such database ({why}): create it, or correct postgres.url")),
        (_, "28") => Error::Schema(format!("postgres refused us ({why}): correct postgres.url")),
        (_, "08" | "40" | "53" | "57" | "58") | ("55P03" | "25006" | "25P03", _) => Error::Unavailable(why),
        _ => Error::Broken(why),
    }
}

fn text(error: &Failure) -> String {
    match error.as_db_error() {
        Some(db) => format!("{}, SQLSTATE {}", db.message(), db.code().code()),
        None => match error.source() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    }
}

pub(super) fn explain_pool(error: &PoolError<Failure>) -> Error {
    match error {
        PoolError::Backend(error) => explain(error),
        PoolError::Timeout(TimeoutType::Wait) => {
            Error::Unavailable("all connections are in use: postgres.pool says how many there are".into())
        }
        PoolError::Timeout(_) => {
            Error::Unavailable("postgres did not take a connection within postgres.connect_timeout".into())
        }
        PoolError::Closed | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            Error::Broken(error.to_string())
        }
    }
}
