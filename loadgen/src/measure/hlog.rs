//! Response times of each second and class as an HdrHistogram interval log, version 1.3 (its `HistogramLogWriter`), which
//! HistogramLogAnalyzer and `HistogramLogProcessor` read.
//!
//! In: batches, those of one second in any order. Out: for each second and class with answers one line: tag
//! `CLASS:response`, begin and length in seconds (the begin counts from `BaseTime`, the run's origin on the wall clock),
//! largest value in nanoseconds, histogram in V2 with deflate. Never: ages of what did not answer, which a reader would take
//! for answers. At its limit: what arrives after the next second has begun to arrive stands in that one's line.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError, Tag};

use super::batch::{Batch, Samples};
use crate::measure::Kind;
use crate::scenario::Scenario;

/// A log that is being written.
pub struct Log<W: Write> {
    out: W,
    serializer: V2DeflateSerializer,
    /// By traffic.
    tags: Vec<String>,
    /// The second that is being gathered, by traffic.
    second: u32,
    gathered: Vec<Samples<u32>>,
}

impl Log<BufWriter<File>> {
    /// As [`Log::begin`], into a new file.
    pub fn create(file: &Path, scenario: &Scenario, origin_unix_ns: u64) -> io::Result<Self> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
        Self::begin(BufWriter::new(File::create(file).map_err(named)?), scenario, origin_unix_ns).map_err(named)
    }
}

impl<W: Write> Log<W> {
    /// Writes the head. `origin_unix_ns` is the run's origin on the wall clock.
    pub fn begin(mut out: W, scenario: &Scenario, origin_unix_ns: u64) -> io::Result<Self> {
        let mut serializer = V2DeflateSerializer::new();
        let origin = UNIX_EPOCH + Duration::from_nanos(origin_unix_ns);
        IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment(&format!("loadgen {}, nanoseconds", env!("CARGO_PKG_VERSION")))
            .with_start_time(origin)
            .with_base_time(origin)
            .begin_log_with(&mut out, &mut serializer)?;
        writeln!(out, "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"")?;
        Ok(Self {
            out,
            serializer,
            tags: scenario.traffic.iter().map(|class| tag(&class.name)).collect(),
            second: 0,
            gathered: scenario.traffic.iter().map(|_| Samples::new()).collect(),
        })
    }

    /// Takes what a worker measured; writes the second before when this is of a later one.
    pub fn add(&mut self, batch: &Batch) -> io::Result<()> {
        if batch.second > self.second {
            self.write_second()?;
            self.second = batch.second;
        }
        for cell in &batch.cells {
            self.gathered[usize::from(cell.traffic)].merge(cell.of(Kind::Response));
        }
        Ok(())
    }

    /// Writes the last second, which is lost without this.
    pub fn end(mut self) -> io::Result<W> {
        self.write_second()?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn write_second(&mut self) -> io::Result<()> {
        // Without a head of its own it goes on with the log.
        let mut lines = IntervalLogWriterBuilder::new().begin_log_with(&mut self.out, &mut self.serializer)?;
        let from = Duration::from_secs(self.second.into());
        for (samples, tag) in self.gathered.iter_mut().zip(&self.tags).filter(|(samples, _)| !samples.is_empty()) {
            let tag = Tag::new(tag);
            lines.write_histogram(&samples.counts, from, Duration::from_secs(1), tag).map_err(|error| match error {
                IntervalLogWriterError::IoError(error) => error,
                IntervalLogWriterError::SerializeError(error) => io::Error::other(error),
            })?;
            samples.clear();
        }
        Ok(())
    }
}

/// A class's name without what ends a tag.
fn tag(class: &str) -> String {
    let class: String = class.chars().map(|c| if c == ',' || c.is_whitespace() { '_' } else { c }).collect();
    format!("{class}:response")
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use hdrhistogram::Histogram;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::Log;
    use crate::measure::Kind;
    use crate::measure::batch::{Batch, Cell};
    use crate::measure::fixture::scenario;

    fn batch(worker: usize, second: u32, answers: &[(u16, u64)]) -> Batch {
        let mut batch = Batch::new(worker, 2);
        batch.second = second;
        for &(traffic, ns) in answers {
            let mut cell = Cell { traffic, ..Cell::new() };
            cell.record(Kind::Response, ns);
            batch.cells.push(cell);
        }
        batch
    }

    #[test]
    fn a_reader_finds_each_second_and_class() {
        let mut scenario = scenario(&[("a", 3)], 2);
        scenario.traffic[1].name = "late, readers".into();
        let mut log = Log::begin(Vec::new(), &scenario, 1_750_000_000_250_000_000).expect("memory");
        log.add(&batch(0, 0, &[(0, 1_000_000), (1, 7_000_000)])).expect("memory");
        log.add(&batch(1, 0, &[(0, 3_000_000)])).expect("memory");
        log.add(&batch(0, 2, &[(0, 5_000_000)])).expect("memory");
        let text = log.end().expect("memory");
        // The crate's own reader does not know the column titles that HistogramLogWriter writes.
        let text: Vec<u8> =
            text.split_inclusive(|&byte| byte == b'\n').filter(|line| line[0] != b'"').flatten().copied().collect();

        let mut found = Vec::new();
        let mut times = Vec::new();
        for entry in IntervalLogIterator::new(&text) {
            match entry.expect("well formed") {
                LogEntry::StartTime(at) | LogEntry::BaseTime(at) => times.push(at.as_millis()),
                LogEntry::Interval(line) => {
                    let bytes = STANDARD.decode(line.encoded_histogram()).expect("base64");
                    let counts: Histogram<u64> = Deserializer::new().deserialize(&mut &bytes[..]).expect("V2");
                    let tag = line.tag().expect("tagged").as_str().to_owned();
                    assert_eq!(line.duration().as_secs(), 1);
                    found.push((line.start_timestamp().as_secs(), tag, counts.len(), counts.max() / 1_000_000));
                }
            }
        }
        assert_eq!(times, [1_750_000_000_250; 2]);
        let expected = [(0, "t0:response", 2, 3), (0, "late__readers:response", 1, 7), (2, "t0:response", 1, 5)];
        assert_eq!(found, expected.map(|(second, tag, count, max)| (second, tag.to_owned(), count, max)));
    }
}
