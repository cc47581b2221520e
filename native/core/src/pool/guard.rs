//! Guard bytes, in debug builds: behind every object a pattern that tells where it lies. It is looked at whenever the
//! object is read, moved or freed: whoever has written beyond the object before it, or laid out two over each other, is
//! found. (To AddressSanitizer the arena is one piece of memory.)

use super::class::MAX_SIZE;
use super::driver::Object;
use crate::object::HEADER_SIZE;
use crate::page::PAGE_SIZE;
use crate::state::State;
use crate::sync::MODEL;

/// Of each object. The fuzzer damages the arena, and a model has better means.
pub const BYTES: usize = if cfg!(all(debug_assertions, not(fuzzing))) && !MODEL { 6 } else { 0 };
/// A whole page with its header has room for them in the largest class: debug builds have the classes that others have.
const _: () = assert!(PAGE_SIZE + HEADER_SIZE + BYTES <= MAX_SIZE);

/// Multiplied with a location, it differs in many bits from what its neighbours have.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

fn pattern(object: &Object) -> [u8; BYTES] {
    let bits = (object.location().units() + 1).wrapping_mul(SPREAD).to_be_bytes();
    std::array::from_fn(|n| bits[n])
}

/// Where they are, in bytes from the arena's start.
fn place(object: &Object) -> usize {
    object.offset + object.size - BYTES
}

/// Writes them.
///
/// # Safety
/// Nobody else may look at the object meanwhile: its location is known to nobody yet.
pub unsafe fn set(state: &State, object: &Object) {
    if BYTES > 0 {
        // SAFETY: an object lies inside the arena; the rest is the caller's promise.
        unsafe { (*state.bytes_mut(place(object), BYTES)).copy_from_slice(&pattern(object)) };
    }
}

/// Panics if somebody has written to them.
///
/// # Safety
/// As for reading the object: it lives, and stays where it is.
pub unsafe fn check(state: &State, object: &Object) {
    if BYTES > 0 {
        // SAFETY: an object lies inside the arena; the rest is the caller's promise.
        let found = unsafe { &*state.bytes(place(object), BYTES) };
        assert!(found == pattern(object), "somebody has written beyond {object:?}: {found:02x?}");
    }
}
