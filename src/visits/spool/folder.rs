//! Folders: the spool's own, which is locked, and that of the rings, which has to be a memory.
//!
//! In: settings. Out: folders that are ours. Never: puts rings where a mapping may raise SIGBUS or lose what was stored.
//! At its limit: on ext4 and xfs a slow disk may stall a core; that is said.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::disk::Disk;
use super::{Epoch, Error, Settings, at, ring};

/// The folder of this start's rings, which is ours for as long as it is open.
#[derive(Debug)]
pub(super) struct RingFolder {
    pub(super) path: PathBuf,
    /// What keeps it ours (flock(2)).
    _lock: File,
}

impl RingFolder {
    /// Where it will lie: named before it is made, so that whatever a kill leaves of it is found.
    pub(super) fn path(base: &Path, epoch: Epoch) -> PathBuf {
        base.join(format!("{RINGS_PREFIX}{:016x}", epoch.0))
    }

    pub(super) fn make(path: PathBuf) -> Result<Self, Error> {
        at("cannot make the folder", &path, DirBuilder::new().mode(0o700).create(&path))?;
        let lock = at("cannot open", &path, File::open(&path))?;
        at("cannot lock", &path, lock.lock())?;
        Ok(Self { path, _lock: lock })
    }
}

const RINGS_PREFIX: &str = "waypost-";
const RINGS: &str = "rings";
const LOCK: &str = "lock";

/// Locks the folder (flock(2)), and tells the spool's number.
pub(super) fn lock(dir: &Path) -> Result<(File, u64), Error> {
    let path = dir.join(LOCK);
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = at("cannot open", &path, open)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse(dir.into())),
        Err(TryLockError::Error(error)) => return at("cannot lock", &path, Err(error)),
    }
    let about = at("cannot read", &path, file.metadata())?;
    // No device: its number may be another one after the next boot. Where the file system does not tell when the lock was
    // made, the inode has to do.
    let made_ns =
        about.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |age| age.as_nanos());
    Ok((file, about.ino() ^ (made_ns as u64).rotate_left(32)))
}

/// What a file system is to a shared mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileSystem {
    Memory,
    /// Outlives the process; may stall it.
    Disk,
    /// May raise SIGBUS, or lose what was stored.
    Elsewhere,
}

fn file_system(path: &Path) -> Result<FileSystem, Error> {
    // statfs(2): tmpfs, ramfs; ext4, xfs.
    let kind = at("cannot look at", path, rustix::fs::statfs(path).map_err(io::Error::from))?.f_type as u64;
    Ok(match kind & 0xffff_ffff {
        0x0102_1994 | 0x8584_58f6 => FileSystem::Memory,
        0xef53 | 0x5846_5342 => FileSystem::Disk,
        _ => FileSystem::Elsewhere,
    })
}

/// The folder that this start's rings lie in.
pub(super) fn ring_base(settings: &Settings) -> Result<PathBuf, Error> {
    if let Some(folder) = &settings.ring {
        at("cannot make the folder", folder, DirBuilder::new().recursive(true).mode(0o700).create(folder))?;
    } else {
        let shm = PathBuf::from("/dev/shm");
        let memory = settings
            .runtime_dir
            .iter()
            .chain([&shm])
            .find(|path| file_system(path).is_ok_and(|kind| kind == FileSystem::Memory));
        if let Some(folder) = memory {
            return Ok(folder.clone());
        }
    }
    let folder = settings.ring.as_ref().unwrap_or(&settings.dir);
    match file_system(folder)? {
        FileSystem::Memory => {}
        FileSystem::Disk => tracing::warn!(
            folder = %folder.display(),
            "the rings lie on a disk: when it is slow, redirects may wait for it; name a tmpfs with spool.ring"
        ),
        FileSystem::Elsewhere => return Err(Error::RingFolder(folder.clone())),
    }
    Ok(folder.clone())
}

/// Folders in `base` that have rings of this spool.
pub(super) fn rings_of(base: &Path, spool: u64) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(base) else { return Vec::new() };
    let folders = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_bytes().starts_with(RINGS_PREFIX.as_bytes()));
    let ours = |path: &PathBuf| ring::open(&path.join("core-0.ring")).is_ok_and(|ring| ring.about().spool == spool);
    folders.map(|entry| entry.path()).filter(ours).collect()
}

/// Where rings lie that may have something; nothing without the file.
pub(super) fn read_rings(dir: &Path) -> io::Result<BTreeSet<PathBuf>> {
    match fs::read(dir.join(RINGS)) {
        Ok(bytes) => {
            let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            Ok(lines.map(|line| PathBuf::from(OsStr::from_bytes(line))).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

pub(super) fn write_rings(dir: &Path, folders: &BTreeSet<PathBuf>, disk: &dyn Disk) -> io::Result<()> {
    let (path, new) = (dir.join(RINGS), dir.join("rings.new"));
    let mut bytes = Vec::new();
    for folder in folders {
        bytes.extend(folder.clone().into_os_string().into_vec());
        bytes.push(b'\n');
    }
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
    file.write_all(&bytes)?;
    disk.sync(&file)?;
    fs::rename(&new, &path)?;
    disk.sync_folder(dir)
}
