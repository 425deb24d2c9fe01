//! The disk under the log, as an argument: a test makes the n-th operation fail, or keeps only what was synced.
//!
//! In: paths, files, bytes. Out: what the kernel says.
//! Never: tries again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// The operations whose failure the log survives; each is the kernel's own unless a test says otherwise.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// A new file with room for `bytes`, so that a full disk shows here and not in the middle. Its length stays 0
    /// (`FALLOC_FL_KEEP_SIZE`, fallocate(2)): a reader never takes what was only reserved for damage.
    fn create(&self, path: &Path, bytes: u64) -> io::Result<File> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(file),
            Err(error) => Err(error.into()),
        }
    }

    fn append(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        let mut file = file;
        file.write_all(bytes)
    }

    /// fdatasync(2).
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    /// What was made, renamed or removed in `dir` lasts.
    fn sync_folder(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// The kernel's.
#[derive(Clone, Copy, Debug)]
pub struct Kernel;

impl Disk for Kernel {}
