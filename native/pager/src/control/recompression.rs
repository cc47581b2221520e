//! The command `recompress`: its words, and its reply.

use super::number;
use std::time::Duration;
use zswapd_core::ages::{MAX_AGE, MAX_TIER};
use zswapd_core::codec::{Algorithm, Compression};
use zswapd_core::error::Error;
use zswapd_core::store::{Order, Outcome, Recompressed, Tier, LEVELS};

/// The order that the words of a command give. Errors: what is wrong with which of them.
pub(super) fn parse([tier, codec, level, age, pages, time]: [&str; 6]) -> Result<Order, Error> {
    let dictionary = codec == "dictionary";
    let algorithm = if dictionary { Algorithm::Zstd } else { codec.parse()? };
    let with = Compression::new(algorithm, number(level, "zstd level", LEVELS)?)?;
    Ok(Order {
        tier: Tier { number: number(tier, "tier", 1..=MAX_TIER)?, with, dictionary },
        age: number(age, "age in ticks", 0..=MAX_AGE)?,
        pages: number(pages, "number of pages", 0..=u64::MAX)?,
        processor_time: Duration::from_micros(number(time, "number of microseconds", 0..=u64::from(u32::MAX))?),
    })
}

/// The reply.
pub(super) fn text(done: &Recompressed) -> String {
    let end = match done.outcome {
        Outcome::Done => "done",
        Outcome::Budget => "budget",
        Outcome::Full => "full",
        Outcome::Stopped => "stopped",
    };
    format!(
        "looked={} recompressed={} not_smaller={} shared={} saved={} microseconds={} end={end}",
        done.looked_at,
        done.recompressed,
        done.not_smaller,
        done.shared,
        done.saved_bytes,
        done.processor_time.as_micros(),
    )
}
