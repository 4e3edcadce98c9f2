//! Files the program writes: found writable before the work starts, written when it is done.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file that can be written.
#[derive(Debug)]
pub(crate) struct OutFile {
    path: PathBuf,
    /// The argument that names it, for messages.
    argument: &'static str,
}

impl OutFile {
    /// Finds out whether the file can be written; changes nothing.
    pub(crate) fn new(path: &Path, argument: &'static str) -> Result<Self> {
        let file = Self { path: path.to_owned(), argument };
        check(path).with_context(|| file.hint())?;
        Ok(file)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of it.
    pub(crate) fn write(&self, text: &str) -> Result<()> {
        fs::write(&self.path, text).with_context(|| self.hint())
    }

    fn hint(&self) -> String {
        format!("{}: cannot write {}; name a file in a folder that exists", self.argument, self.path.display())
    }
}

/// Opens a file that is there, or makes one and takes it away again.
fn check(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(present) if present.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Ok(present) if present.is_file() => OpenOptions::new().append(true).open(path).map(drop),
        // A device, or a pipe, which would wait for its reader.
        Ok(_) => Ok(()),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Err(_) => match fs::read_link(path) {
            Ok(target) => check(&path.parent().unwrap_or(Path::new("")).join(target)),
            Err(_) => {
                OpenOptions::new().write(true).create_new(true).open(path)?;
                fs::remove_file(path)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_leaves_no_file_and_changes_none() {
        let folder = tempfile::tempdir().unwrap();
        let (new, present) = (folder.path().join("new"), folder.path().join("present"));
        fs::write(&present, "before").unwrap();
        let file = OutFile::new(&new, "--out").unwrap();
        assert!(OutFile::new(&present, "--out").is_ok());
        assert!(!new.exists());
        assert_eq!(fs::read_to_string(&present).unwrap(), "before");
        file.write("after").unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "after");
        for wrong in [folder.path().to_owned(), folder.path().join("no/x"), present.join("x")] {
            let message = format!("{:#}", OutFile::new(&wrong, "--out").unwrap_err());
            assert!(
                message.starts_with("--out: cannot write") && message.contains(wrong.to_str().unwrap()),
                "{message}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_to_nothing_are_followed_and_pipes_are_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("absent", at("link")).unwrap();
        std::os::unix::fs::symlink("no/absent", at("lost")).unwrap();
        assert!(OutFile::new(&at("link"), "--out").is_ok());
        assert!(at("link").is_symlink() && !at("absent").exists());
        assert!(OutFile::new(&at("lost"), "--out").is_err());
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        assert!(OutFile::new(&at("pipe"), "--out").is_ok());
    }
}
