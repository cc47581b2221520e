//! What the fuzz targets share: page contents of every kind that is stored differently, from few bytes of input.

use arbitrary::Arbitrary;

#[derive(Arbitrary, Debug)]
pub enum Contents<'a> {
    /// Same-filled.
    Word(u32),
    /// Compressible.
    Repeated(&'a [u8]),
    /// Incompressible.
    Noise(u32),
}

impl Contents<'_> {
    pub fn bytes(&self, length: usize) -> Vec<u8> {
        let repeated = |pattern: &[u8]| pattern.iter().copied().cycle().take(length).collect();
        match self {
            Contents::Word(word) => repeated(&word.to_ne_bytes()),
            Contents::Repeated(pattern) if pattern.is_empty() => vec![0; length],
            Contents::Repeated(pattern) => repeated(pattern),
            Contents::Noise(seed) => noise(*seed, length),
        }
    }
}

fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut x = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_ne_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(length);
    bytes
}
