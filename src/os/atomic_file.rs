//! Replaces a file in one step: readers see the old content or the new content, never part of it.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What a write survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A crash of this process. The kernel decides when the content reaches the disk.
    Process,
    /// A crash of the machine: file and directory are synced before the write returns.
    Machine,
}

/// Writes a temporary file beside `path` and renames it to `path`. The directory must exist; `mode` is subject to the
/// umask.
pub fn write(path: &Path, bytes: &[u8], mode: u32, durability: Durability) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".").permissions(Permissions::from_mode(mode)).tempfile_in(dir)?;
    file.write_all(bytes)?;
    if durability == Durability::Machine {
        file.as_file().sync_all()?;
    }
    file.persist(path)?;
    if durability == Durability::Machine {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}
