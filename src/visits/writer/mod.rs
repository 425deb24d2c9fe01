//! The writer: from the log to the sink, exactly once.
