//! The refill thread: keeps the pool's reserve of memory filled.
//!
//! On a machine that is short of memory others need what is left more: the kernel takes some to write to the swap device
//! (see `ballast.rs`). So there the thread waits as long as a free region is left, and takes memory slowly after that.
//! All it could do is wait for it anyway: what serves I/O for reclaim does not write out pages to get memory.

use crate::process;
use crate::watermark::Watermark;
use std::thread;
use std::time::Duration;
use zswapd_core::error::Result;
use zswapd_core::pool::{Need, Pool, PIECE_BYTES};

/// Between two looks at the machine's memory, or two pieces of it, while it is short.
const PAUSE: Duration = Duration::from_millis(2);
/// After the system has refused memory.
const AFTER_ERROR: Duration = Duration::from_millis(100);

#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Pause,
    /// Until the reserve needs something.
    Park,
}

/// Keeps the reserve filled, for ever.
pub fn run(pool: &Pool, watermark: Watermark) {
    process::hurry();
    pool.become_adjuster();
    loop {
        match step(pool, || !watermark.leaves(PIECE_BYTES)) {
            Ok(Next::GoOn) => {}
            // Not parked: every page that takes of the reserve unparks us.
            Ok(Next::Pause) => thread::sleep(PAUSE),
            Ok(Next::Park) => thread::park(),
            Err(error) => {
                eprintln!("zswapd-pager: {error}; trying again");
                thread::sleep(AFTER_ERROR);
            }
        }
    }
}

/// Takes some memory, or gives some back, unless that can wait.
fn step(pool: &Pool, is_short: impl Fn() -> bool) -> Result<Next> {
    let need = pool.need();
    if need == Need::None || !is_short() {
        return Ok(if pool.adjust()? { Next::GoOn } else { Next::Park });
    }
    if need == Need::Urgent {
        pool.adjust()?;
    }
    Ok(Next::Pause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zswapd_core::codec::{Algorithm, Compression};
    use zswapd_core::engine::Engine;
    use zswapd_core::pool::Allocator;
    use zswapd_core::store::Files;

    #[test]
    fn a_short_machine_is_left_its_memory_as_long_as_the_reserve_lasts() {
        let compression = Compression::new(Algorithm::Lz4, 1).expect("in range");
        let engine =
            Engine::new(64 << 20, Allocator::Zsmalloc, 64 << 20, compression, Files::default()).expect("engine");
        let pool = engine.store().pool();
        let backed = || engine.store().metrics().backed_bytes.get();
        // With no reserve it takes memory all the same, slowly, and no more than it must.
        while backed() == 0 {
            assert_eq!(step(pool, || true).expect("memory"), Next::Pause);
        }
        let one = backed();
        for _ in 0..=one / PIECE_BYTES {
            assert_eq!(step(pool, || true).expect("memory"), Next::Pause);
        }
        assert_eq!(backed(), one);
        while step(pool, || false).expect("memory") == Next::GoOn {}
        assert!(backed() > one);
        // There is nothing to wait for.
        assert_eq!(step(pool, || true).expect("looked"), Next::Park);
    }
}
