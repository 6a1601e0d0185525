//! A wall clock that jumps, as after a laptop's sleep: that of one process, moved by libfaketime.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The wall clock of one process. Its timers go on as they are.
pub struct MovedClock {
    library: String,
    file: PathBuf,
}

impl MovedClock {
    /// One that is right. Where the library is, the wrapper of that name tells.
    pub fn new(dir: &Path) -> Self {
        let wrapped = Command::new("faketime").args(["-f", "+0", "printenv", "LD_PRELOAD"]).output();
        let library = wrapped.expect("this test wants `faketime` (Debian and Ubuntu: apt-get install faketime)").stdout;
        let clock =
            Self { library: String::from_utf8(library).expect("a path").trim().to_owned(), file: dir.join("clock") };
        clock.is_ahead("+0");
        clock
    }

    /// The clock of this command, once it runs.
    pub fn of(&self, command: &mut tokio::process::Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("FAKETIME_TIMESTAMP_FILE", &self.file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }

    /// Moves it: `+13h`.
    pub fn is_ahead(&self, by: &str) {
        // At once: half a file would be another time.
        let new = self.file.with_extension("new");
        std::fs::write(&new, by).expect("written");
        std::fs::rename(&new, &self.file).expect("renamed");
    }
}
