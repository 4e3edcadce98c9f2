//! Compiled kernels on disk, so that each is compiled once for a device and compiler, whatever the number of processes.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

/// The environment variable with the folder for compiled kernels; empty for none. Without it, `tilefold` in the user's
/// folder for caches.
pub const CACHE_VARIABLE: &str = "TILEFOLD_CACHE_DIR";

/// First bytes of a file; the number is that of the format.
const MAGIC: [u8; 16] = *b"tilefold kernel1";
/// Magic, length, SHA-256 of what follows.
const HEADER_BYTES: usize = MAGIC.len() + 8 + 32;

/// A folder of compiled kernels.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
    warned: AtomicBool,
}

impl Cache {
    /// The folder the environment names, or the user's.
    pub(crate) fn from_environment() -> Self {
        Self::at(folder(|name| env::var_os(name)))
    }

    /// A folder, or none.
    pub(crate) fn at(folder: Option<PathBuf>) -> Self {
        Self { folder, warned: AtomicBool::new(false) }
    }

    /// What stands under a key, or what `make` gives, which is then written there.
    ///
    /// A file that was cut short or changed is made anew; a folder that cannot be written is a warning, once.
    ///
    /// # Errors
    /// What `make` reports.
    pub(crate) fn get<E>(&self, key: &str, make: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
        let Some(folder) = &self.folder else { return make() };
        let path = folder.join(key);
        if let Some(data) = read(&path) {
            return Ok(data);
        }
        let data = make()?;
        if let Err(error) = write(folder, &path, &data) {
            self.warn(folder, &error);
        }
        Ok(data)
    }

    fn warn(&self, folder: &Path, error: &io::Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            let folder = folder.display();
            tracing::warn!(%folder, %error, "compiled kernels cannot be kept there; set {CACHE_VARIABLE} to a folder");
        }
    }
}

/// The file name of something compiled: a hash of everything that decides about the result.
pub(crate) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(named) = variable(CACHE_VARIABLE) {
        return Some(PathBuf::from(named)).filter(|path| !path.as_os_str().is_empty());
    }
    let set = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::home_dir().filter(|path| path.is_absolute()).map(|home| home.join(".cache"));
    let user = if cfg!(windows) { set("LOCALAPPDATA") } else { set("XDG_CACHE_HOME").or_else(home) };
    user.map(|user| user.join("tilefold"))
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::read(path).ok()?;
    let header = file.get(..HEADER_BYTES)?;
    let (head, sum) = header.split_at(HEADER_BYTES - 32);
    let (magic, length) = head.split_at(MAGIC.len());
    let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    let data = file.get(HEADER_BYTES..)?;
    let whole = magic == MAGIC && data.len() == length && sum == Sha256::digest(data).as_slice();
    if !whole {
        tracing::debug!(path = %path.display(), "a damaged file of compiled code is replaced");
        return None;
    }
    Some(file.split_off(HEADER_BYTES))
}

/// Writes beside the place and renames: whoever reads sees all of it or nothing.
fn write(folder: &Path, path: &Path, data: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&MAGIC)?;
    file.write_all(&u64::try_from(data.len()).unwrap_or(u64::MAX).to_le_bytes())?;
    file.write_all(&Sha256::digest(data))?;
    file.write_all(data)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn made(cache: &Cache, key: &str, data: &[u8]) -> (Vec<u8>, bool) {
        let mut made = false;
        let got = cache.get(key, || {
            made = true;
            Ok::<_, Infallible>(data.to_vec())
        });
        (got.unwrap(), made)
    }

    #[test]
    fn what_was_made_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(Some(folder.path().join("new")));
        assert_eq!(made(&cache, "a", b"code"), (b"code".to_vec(), true));
        assert_eq!(made(&cache, "a", b"other"), (b"code".to_vec(), false));
        assert_eq!(made(&cache, "b", b""), (vec![], true));
        assert_eq!(made(&cache, "b", b"x"), (vec![], false));
        assert_eq!(made(&Cache::at(None), "a", b"x"), (b"x".to_vec(), true));
    }

    #[test]
    fn damaged_files_are_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, path) = (Cache::at(Some(folder.path().to_owned())), folder.path().join("a"));
        made(&cache, "a", b"code");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            for damaged in [&flipped[..], &whole[..at], &[&whole[..], b"x"].concat()] {
                fs::write(&path, damaged).unwrap();
                assert_eq!(made(&cache, "a", b"anew"), (b"anew".to_vec(), true), "byte {at}");
                assert_eq!(made(&cache, "a", b"other"), (b"anew".to_vec(), false));
            }
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = Cache::at(Some(file.join("below a file")));
        for _ in 0..2 {
            assert_eq!(made(&cache, "a", b"code"), (b"code".to_vec(), true));
            assert!(cache.warned.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn writers_at_once_leave_one_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, data) = (Cache::at(Some(folder.path().to_owned())), vec![7_u8; 1 << 20]);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..4).for_each(|_| assert_eq!(made(&cache, "a", &data).0, data)));
            }
        });
        assert_eq!(read(&folder.path().join("a")).unwrap(), data);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn the_folder_follows_the_environment() {
        let variables = |list: &'static [(&str, &str)]| {
            folder(move |name| list.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        assert_eq!(variables(&[(CACHE_VARIABLE, "/x"), ("XDG_CACHE_HOME", "/y")]), Some("/x".into()));
        assert_eq!(variables(&[(CACHE_VARIABLE, "")]), None);
        #[cfg(not(windows))]
        assert_eq!(variables(&[("XDG_CACHE_HOME", "/y")]), Some("/y/tilefold".into()));
    }

    #[test]
    fn keys_tell_where_a_part_ends() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["ab"]).len(), 64);
    }
}
