//! Clusters: one record that has the pages of four neighbouring slots, which compress better together.
//!
//! The object of such a record has no header of its own. It begins with the generations of the slot words that name it, 2
//! bytes for each; the rest is the caller's. The slot in the record's header is the first of the four, and the generation
//! there says that it is a cluster ([`CLUSTER`]): no slot word has such a one.
//!
//! Each of the four words names the whole record, and is a page's only commit point, as ever: the others are nothing to it.
//! On the disk each has a quarter of the record; it is free when all four are gone.

use crate::page::CLUSTER_PAGES;

/// Of record headers, in the place of a generation.
pub const CLUSTER: u16 = 1 << 15;
/// Bytes of the generations.
pub const GENERATIONS: usize = 2 * CLUSTER_PAGES;

/// The first slot of the cluster that a slot belongs to, if to any.
pub fn first_of(slot: u32) -> u32 {
    slot / CLUSTER_PAGES as u32 * CLUSTER_PAGES as u32
}

/// Which of its cluster's pages a slot's is.
pub fn member_of(slot: u32) -> usize {
    slot as usize % CLUSTER_PAGES
}

/// Writes the generations into an object.
pub fn set_generations(object: &mut [u8], generations: [u16; CLUSTER_PAGES]) {
    for (bytes, generation) in object.chunks_exact_mut(2).zip(generations) {
        bytes.copy_from_slice(&generation.to_le_bytes());
    }
}

/// The generations that an object of a cluster begins with, and the rest of it. None if it is too short to be one.
pub fn split(object: &[u8]) -> Option<([u16; CLUSTER_PAGES], &[u8])> {
    let (generations, rest) = object.split_first_chunk::<GENERATIONS>()?;
    Some((std::array::from_fn(|n| u16::from_le_bytes([generations[2 * n], generations[2 * n + 1]])), rest))
}
