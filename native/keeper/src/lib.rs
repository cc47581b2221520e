//! What a keeper and its pagers have in common.

pub mod channel;
pub mod descriptors;
pub mod process;
pub mod socket;
