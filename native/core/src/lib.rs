//! The page store of zswapd: it knows neither Python nor FUSE.
//!
//! A page comes in through [`engine::Engine`] (byte ranges), goes to [`store::Store`] (one page, one slot),
//! through [`codec`] into the zsmalloc [`pool`], and is committed by one 64-bit word in [`slots`].
//! Dependencies point one way:
//!
//! ```text
//! engine → store → {slots, codec, pool, object} → {state, page, metrics, locks, gate} → sync
//! ```

pub mod codec;
pub mod engine;
pub mod error;
pub mod gate;
pub mod locks;
pub mod memory;
pub mod metrics;
pub mod object;
pub mod page;
pub mod pool;
pub mod slots;
pub mod state;
pub mod store;
mod sync;
