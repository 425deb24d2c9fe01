//! A distribution as HdrHistogram's percentile text, which its plotter and many tools read.
//!
//! In: a [`Distribution`]. Out: a header line, an empty line, then lines of value (milliseconds), percentile (0 to 1), number
//! of values at or below, and `1/(1-percentile)`, which the last line lacks; then three lines that begin with `#`: mean and
//! standard deviation, largest value and count, the histogram's shape. Percentiles come in five steps for each halving of the
//! distance to 1. That is what `outputPercentileDistribution` of HdrHistogram's `AbstractHistogram` writes (its Javadoc) and
//! what its `plotFiles.html` reads: four columns by spaces, no line with `#`. Never: anything else. At its limit: ages of what
//! never answered stand among the values as the bounds that they are, and a fourth `#` line tells how many.

use std::io::{self, Write};

use super::percentile::Distribution;

const STEPS_PER_HALVING: u32 = 5;

/// Writes the whole text; without values the header and the `#` lines alone.
pub fn write(out: &mut impl Write, distribution: &Distribution) -> io::Result<()> {
    let mut counts = distribution.known.clone();
    counts.add(&distribution.censored).expect("they resize themselves");
    // A bucket's top lies beyond the largest value; exact where that is known.
    let longest_ns = if distribution.censored.is_empty() { distribution.max_ns } else { counts.max() };
    let ms = |ns: u64| ns.min(longest_ns) as f64 / 1e6;

    writeln!(out, "{:>12} {:>14} {:>10} {:>14}\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)")?;
    let mut below = 0;
    if !counts.is_empty() {
        for step in counts.iter_quantiles(STEPS_PER_HALVING) {
            below += step.count_since_last_iteration();
            let percentile = step.quantile_iterated_to();
            write!(out, "{:12.3} {percentile:.12} {below:10}", ms(step.value_iterated_to()))?;
            if percentile < 1.0 {
                write!(out, " {:14.2}", 1.0 / (1.0 - percentile))?;
            }
            writeln!(out)?;
        }
    }
    let (mean, deviation) = (counts.mean() / 1e6, counts.stdev() / 1e6);
    let longest = if counts.is_empty() { 0.0 } else { ms(longest_ns) };
    writeln!(out, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]")?;
    writeln!(out, "#[Max     = {longest:12.3}, Total count    = {:12}]", counts.len())?;
    writeln!(out, "#[Buckets = {:12}, SubBuckets     = {:12}]", counts.buckets(), 2048)?;
    if !distribution.censored.is_empty() {
        writeln!(out, "#[At least = {:11}]", distribution.censored.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::write;
    use crate::measure::batch::Samples;
    use crate::measure::percentile::Distribution;

    fn text(known: &[u64], censored: &[u64]) -> String {
        let [known, censored] = [known, censored].map(|values| {
            let mut samples = Samples::new();
            values.iter().for_each(|&value| samples.record(value));
            samples
        });
        let mut out = Vec::new();
        write(&mut out, &Distribution::new(known, censored)).expect("memory");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn it_is_the_classic_text() {
        let expected = "       Value     Percentile TotalCount 1/(1-Percentile)

       1.000 0.000000000000          1           1.00
       1.000 0.100000000000          1           1.11
       1.000 0.200000000000          1           1.25
       2.001 0.300000000000          2           1.43
       2.001 0.400000000000          2           1.67
       2.001 0.500000000000          2           2.00
       3.000 0.550000000000          3           2.22
       3.000 0.600000000000          3           2.50
       3.000 0.650000000000          3           2.86
       3.000 0.700000000000          3           3.33
       4.000 0.750000000000          4           4.00
       4.000 1.000000000000          4
#[Mean    =        2.500, StdDeviation   =        1.118]
#[Max     =        4.000, Total count    =            4]
#[Buckets =            3, SubBuckets     =         2048]
";
        assert_eq!(text(&[1_000_000, 2_000_000, 3_000_000, 4_000_000], &[]), expected);
    }

    #[test]
    fn a_plotter_finds_four_columns_that_rise() {
        let check = |known: &[u64], censored: &[u64], rows: bool| {
            let text = text(known, censored);
            let mut last = [0.0; 4];
            let mut read = 0;
            for line in text.lines().skip(2).filter(|line| !line.starts_with('#')) {
                let columns: Vec<f64> =
                    line.split_whitespace().map(|column| column.parse().expect("a number")).collect();
                assert!(columns.len() == 4 || columns[1] == 1.0, "{line}");
                assert!(columns.iter().zip(last).all(|(now, last)| *now >= last), "{line} after {last:?}");
                last[..columns.len()].copy_from_slice(&columns);
                read += 1;
            }
            assert_eq!(read > 0, rows, "{text}");
            assert_eq!(last[2] as usize, known.len() + censored.len());
            assert_eq!(text.contains("#[At least"), !censored.is_empty());
        };
        check(&[], &[], false);
        check(&[200_000], &[], true);
        check(&(0..5000).map(|n| n * n * 100).collect::<Vec<_>>(), &[], true);
        check(&[1_000_000, 2_000_000], &[5_000_000_000; 7], true);
    }
}
