//! What makes a record unreadable to others, and vouches for it: AES-256-GCM, or without encryption a checksum in the
//! place of the tag.
//!
//! Both cover the object, the header and the location: a record that is found at another place, or through another
//! slot's word or an older one, does not open.
//!
//! A nonce is the state's counter, raised before it is used. Who writes an object again, after an error or for another
//! place, seals it anew, with a new nonce. The key lives in the state's header, so that who goes on with a state after a
//! crash goes on with its key. It is wiped at the store's end.

use super::record::{max_object, record_bytes, DiskLocation, Header, RECORD_HEADER, TAG};
use crate::crash::crash_point;
use crate::error::{Error, Result};
use crate::state::State;
use crate::sync::Ordering::Relaxed;
use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use xxhash_rust::xxh3::{xxh3_128_with_seed, xxh3_64, xxh3_64_with_seed};
use zeroize::Zeroizing;

pub struct Cipher {
    state: Arc<State>,
    /// Of the checksums, and of this state alone: what the disk still has from before, or from somebody else, does not open.
    seed: u64,
    /// None inside: it is wiped, as it is when dropped. In a box: moved, it would leave a copy behind. The lock is taken
    /// for writing once, at the end, so that nobody waits for it.
    encryption: Option<RwLock<Option<Box<Aes256Gcm>>>>,
}

impl Cipher {
    /// With the state's key, or a new one, from the system's randomness. Errors: [`Error::System`] without any.
    pub fn new(encryption: bool, state: Arc<State>) -> Result<Cipher> {
        let key = key(&state)?;
        let gcm = || Box::new(Aes256Gcm::new_from_slice(key.as_flattened()).expect("a key of 32 bytes"));
        let encryption = encryption.then(|| RwLock::new(Some(gcm())));
        Ok(Cipher { seed: xxh3_64(key.as_flattened()), state, encryption })
    }

    /// Makes a record of an object: `record` is as long as it has to be, and lies at `at`.
    pub fn seal(&self, record: &mut [u8], slot: u32, generation: u16, at: DiskLocation, object: &[u8]) {
        debug_assert!(object.len() <= max_object(generation) && record.len() == record_bytes(object.len()));
        let nonce = match self.encryption {
            Some(_) => self.next_nonce(),
            None => 0,
        };
        let header = Header { slot, object_bytes: object.len() as u16, generation, nonce };
        let (head, rest) = record.split_at_mut(RECORD_HEADER);
        let (sealed, rest) = rest.split_at_mut(object.len());
        let (tag, padding) = rest.split_at_mut(TAG);
        head.copy_from_slice(&header.to_bytes());
        sealed.copy_from_slice(object);
        padding.fill(0);
        let associated = associated(header, at);
        tag.copy_from_slice(&match &self.encryption {
            None => self.checksum(&associated, object),
            Some(gcm) => match &*gcm.read().unwrap_or_else(PoisonError::into_inner) {
                Some(gcm) => {
                    let tag = gcm.encrypt_inout_detached(&nonce_of(header), &associated, sealed.into());
                    // Its one error is an object of 64 GiB.
                    <[u8; TAG]>::from(tag.expect("an object of at most some pages"))
                }
                // Nobody should; and nothing goes out readable.
                None => {
                    sealed.fill(0);
                    [0; TAG]
                }
            },
        });
    }

    /// Raised before it is used. Relaxed: no two get the same, which is all that matters.
    fn next_nonce(&self) -> u64 {
        crash_point("before the nonce");
        let nonce = self.state.cipher().next_nonce.fetch_add(1, Relaxed);
        crash_point("after the nonce");
        nonce
    }

    /// The object of a record that was read at `at`, decrypted in place: at most once. None if it is not what was
    /// sealed there for this slot and generation.
    pub fn open<'b>(&self, record: &'b mut [u8], slot: u32, generation: u16, at: DiskLocation) -> Option<&'b [u8]> {
        let header = Header::of(record)?;
        let object_bytes = usize::from(header.object_bytes);
        if (header.slot, header.generation, record_bytes(object_bytes)) != (slot, generation, record.len()) {
            return None;
        }
        let (object, rest) = record[RECORD_HEADER..].split_at_mut(object_bytes);
        let (tag, _) = rest.split_first_chunk::<TAG>()?;
        let associated = associated(header, at);
        match &self.encryption {
            None => (self.checksum(&associated, object) == *tag).then_some(object),
            Some(gcm) => {
                let gcm = gcm.read().unwrap_or_else(PoisonError::into_inner);
                let (nonce, tag) = (nonce_of(header), Tag::from(*tag));
                let opened = gcm.as_ref()?.decrypt_inout_detached(&nonce, &associated, (&mut *object).into(), &tag);
                opened.ok().map(|()| &*object)
            }
        }
    }

    fn checksum(&self, associated: &[u8], object: &[u8]) -> [u8; TAG] {
        xxh3_128_with_seed(object, xxh3_64_with_seed(associated, self.seed)).to_le_bytes()
    }

    /// Forgets the key, for this process and for who opens the state: what was encrypted with it opens no more, and
    /// nothing can be sealed.
    pub fn wipe(&self) {
        self.state.cipher().key.iter().for_each(|word| word.store(0, Relaxed));
        if let Some(gcm) = &self.encryption {
            *gcm.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// The key of the state, made now if it has none.
fn key(state: &State) -> Result<Zeroizing<[[u8; 8]; 4]>> {
    let words = &state.cipher().key;
    let mut key = Zeroizing::new([[0; 8]; 4]);
    if words.iter().all(|word| word.load(Relaxed) == 0) {
        getrandom::fill(key.as_flattened_mut()).map_err(|error| Error::System {
            what: "cannot make a key for the backing disk (getrandom)",
            source: io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        words.iter().zip(&*key).for_each(|(word, bytes)| word.store(u64::from_ne_bytes(*bytes), Relaxed));
    } else {
        words.iter().zip(&mut *key).for_each(|(word, bytes)| *bytes = word.load(Relaxed).to_ne_bytes());
    }
    Ok(key)
}

fn nonce_of(header: Header) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&header.nonce.to_le_bytes());
    nonce.into()
}

/// What the tag vouches for beside the object.
fn associated(header: Header, at: DiskLocation) -> [u8; RECORD_HEADER + 8] {
    let mut associated = [0; RECORD_HEADER + 8];
    associated[..RECORD_HEADER].copy_from_slice(&header.to_bytes());
    associated[RECORD_HEADER..].copy_from_slice(&at.to_bits().to_le_bytes());
    associated
}
