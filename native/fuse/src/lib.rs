//! The FUSE protocol as the pager speaks it: [`wire`] (what the kernel sends), [`reply`] (what it is answered),
//! [`init`] (what is negotiated), [`swapfile`] (the requests on the swap file) and [`mount`].
//!
//! Nothing here allocates, and nothing trusts a length that came from outside.

pub mod init;
pub mod mount;
pub mod reply;
pub mod swapfile;
pub mod wire;
