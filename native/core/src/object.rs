//! The header that every object in the arena begins with, and its checksum.
//!
//! ```text
//! 0..4    index of the slot that the object belongs to
//! 4..8    checksum: xxh3 of the payload, seeded with all other fields
//! 8..10   codec (top 3 bits) and payload length (0..=4096)
//! ```

use crate::codec::Codec;
use crate::page::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub const HEADER_SIZE: usize = 10;

const LENGTH_BITS: u32 = 13;

/// Writes header and payload into `object`, which may be longer (the rest is padding of the size class).
pub fn write(object: &mut [u8], slot: u32, codec: Codec, payload: &[u8]) {
    let kind = (codec as u16) << LENGTH_BITS | payload.len() as u16;
    object[..4].copy_from_slice(&slot.to_le_bytes());
    object[4..8].copy_from_slice(&checksum(slot, kind, payload).to_le_bytes());
    object[8..10].copy_from_slice(&kind.to_le_bytes());
    object[HEADER_SIZE..HEADER_SIZE + payload.len()].copy_from_slice(payload);
}

/// The slot that the header names.
pub fn slot_of(object: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(object.get(..4)?.try_into().ok()?))
}

/// Whether the header names this slot. If not, whoever found the object through that slot's word must leave it alone.
pub fn belongs_to(object: &[u8], slot: u32) -> bool {
    slot_of(object) == Some(slot)
}

/// Codec and payload length as the header says, unverified: for accounting. None if they make no sense.
pub fn peek(object: &[u8]) -> Option<(Codec, usize)> {
    let kind = u16::from_le_bytes(object.get(8..10)?.try_into().ok()?);
    let length = usize::from(kind & ((1 << LENGTH_BITS) - 1));
    let fits = length <= PAGE_SIZE && HEADER_SIZE + length <= object.len();
    Some((Codec::from_number(kind >> LENGTH_BITS)?, length)).filter(|_| fits)
}

/// Codec and payload of the object, if it is the object of `slot` and its bytes are as they were written.
pub fn verify(object: &[u8], slot: u32) -> Option<(Codec, &[u8])> {
    let (codec, length) = peek(object)?;
    let payload = &object[HEADER_SIZE..HEADER_SIZE + length];
    let kind = (codec as u16) << LENGTH_BITS | length as u16;
    let intact = belongs_to(object, slot) && object[4..8] == checksum(slot, kind, payload).to_le_bytes();
    intact.then_some((codec, payload))
}

/// The seed binds the payload to its slot: an object found through the wrong slot word does not verify.
fn checksum(slot: u32, kind: u16, payload: &[u8]) -> u32 {
    xxh3_64_with_seed(payload, u64::from(kind) << 32 | u64::from(slot)) as u32
}

#[cfg(all(test, not(feature = "model")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_object_verifies_and_any_flipped_bit_is_seen(
            slot: u32, payload in prop::collection::vec(any::<u8>(), 0..=PAGE_SIZE), at: prop::sample::Index, bit in 0..8,
        ) {
            let used = HEADER_SIZE + payload.len();
            let mut object = vec![0xaa; used.next_multiple_of(16)];
            write(&mut object, slot, Codec::Zstd, &payload);
            prop_assert_eq!(verify(&object, slot), Some((Codec::Zstd, &payload[..])));
            prop_assert_eq!(verify(&object, slot ^ 1), None);
            object[at.index(used)] ^= 1u8 << bit;
            prop_assert_eq!(verify(&object, slot), None);
        }
    }
}
