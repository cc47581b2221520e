//! Any bytes as an object of the arena, as a damaged slot word or arena would have them read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zswapd_core::object::{self, HEADER_SIZE};

fuzz_target!(|input: (u32, &[u8])| {
    // In memory that ends where the object does.
    let (slot, bytes): (u32, Box<[u8]>) = (input.0, input.1.into());
    let peeked = object::peek(&bytes);
    if let Some((codec, payload)) = object::verify(&bytes, slot) {
        assert_eq!(peeked, Some((codec, payload.len())));
        let mut written = vec![0; HEADER_SIZE + payload.len()];
        object::write(&mut written, slot, codec, payload);
        assert!(bytes.starts_with(&written), "verified, but not as it would be written");
    }
    // As the fuzzer cannot guess a checksum: the same payload under a header that is right.
    if let Some((codec, length)) = peeked {
        let payload = &bytes[HEADER_SIZE..HEADER_SIZE + length];
        let mut written = bytes.clone();
        object::write(&mut written, slot, codec, payload);
        assert_eq!(object::verify(&written, slot), Some((codec, payload)));
        assert_eq!(object::verify(&written, !slot), None);
    }
});
