//! What a page is, and the pages that need no memory.

pub const PAGE_SIZE: usize = 4096;

pub type Page = [u8; PAGE_SIZE];

/// So many neighbouring slots, aligned, may have their pages in one record of the backing disk.
pub const CLUSTER_PAGES: usize = 4;

pub type Cluster = [Page; CLUSTER_PAGES];

/// Returns the 32-bit word that the page repeats, if it does (zswap's same-filled pages).
///
/// The kernel looks for a repeated 64-bit word; 32 bits fit into a slot word, which then is all that is stored.
/// A page of a longer pattern goes through the codec like any other.
pub fn same_filled(page: &Page) -> Option<u32> {
    // A page that repeats its first 4 bytes equals itself shifted by 4; memcmp ends at the first difference.
    if page[4..] != page[..PAGE_SIZE - 4] {
        return None;
    }
    Some(u32::from_ne_bytes([page[0], page[1], page[2], page[3]]))
}

/// Fills the page with one repeated 32-bit word.
pub fn fill(page: &mut Page, word: u32) {
    for chunk in page.chunks_exact_mut(4) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_filled_page_is_same_filled(word: u32) {
            let mut page = [0; PAGE_SIZE];
            fill(&mut page, word);
            prop_assert_eq!(same_filled(&page), Some(word));
        }

        #[test]
        fn one_different_byte_is_seen(word: u32, at in 0..PAGE_SIZE, bit in 0..8) {
            let mut page = [0; PAGE_SIZE];
            fill(&mut page, word);
            page[at] ^= 1u8 << bit;
            prop_assert_eq!(same_filled(&page), None);
        }
    }
}
