//! The page store of zswapd: it knows neither Python nor FUSE.
//!
//! A page comes in through [`engine::Engine`] (byte ranges), goes to [`store::Store`] (one page, one slot),
//! through [`codec`] into the [`pool`], and is committed by one 64-bit word in [`slots`].
//! What the pool has no room for goes to the [`backing`] disk, the page first that the [`lru`] finds coldest.
//! Dependencies point one way:
//!
//! ```text
//! engine → store → {slots, lru, ages, dictionaries, duplicates, references, scratch → codec, pool, backing, object}
//!        → {state, touched, page, metrics, locks, gate} → {session, sync, crash}
//! ```

pub mod ages;
pub mod backing;
pub mod codec;
pub mod crash;
pub mod dictionaries;
pub mod duplicates;
pub mod engine;
pub mod error;
pub mod gate;
pub mod locks;
pub mod lru;
#[cfg_attr(any(feature = "loom", feature = "shuttle", miri), path = "models/standin/memory.rs")]
pub mod memory;
pub mod metrics;
pub mod object;
pub mod page;
pub mod pool;
pub mod references;
pub mod scratch;
pub mod session;
pub mod slots;
#[cfg_attr(any(feature = "loom", feature = "shuttle", miri), path = "models/standin/state.rs")]
pub mod state;
pub mod store;
#[cfg_attr(any(feature = "loom", feature = "shuttle"), path = "models/standin/sync.rs")]
mod sync;
pub mod touched;

#[cfg(all(test, feature = "model"))]
mod models;
