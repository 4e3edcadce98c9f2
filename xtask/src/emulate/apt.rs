//! `apt-get` with lists of its own: packages are downloaded and unpacked, never installed.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{BOCHS_RELEASE, RELEASE, files, run, say, works, write};

/// `apt-get` with package lists and settings of its own.
pub(crate) struct Apt {
    config: PathBuf,
}

impl Apt {
    /// Writes the settings and fetches the package lists, from the mirror that the system's own apt uses.
    pub(crate) fn open(home: &Path) -> Result<Self> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            if !works(tool, "--version") {
                bail!("{tool} not found: the emulators come from Debian packages, so this needs Debian or a kin of it");
            }
        }
        let apt = home.join("apt");
        for folder in ["lists/partial", "cache/archives/partial", "parts"] {
            let path = apt.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let config = apt.join("apt.conf");
        let at = |name: &str| apt.join(name).display().to_string();
        let settings = [
            format!("Dir::State::lists \"{}\";", at("lists")),
            format!("Dir::Cache \"{}\";", at("cache")),
            format!("Dir::Etc::sourcelist \"{}\";", at("sources.list")),
            format!("Dir::Etc::sourceparts \"{}\";", at("parts")),
            "APT::Architectures { \"amd64\"; \"arm64\"; };".to_owned(),
            // As root, apt would download as a user who may not be able to write here.
            "APT::Sandbox::User \"\";".to_owned(),
            "Acquire::Languages \"none\";".to_owned(),
            "Acquire::Retries \"3\";".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";".to_owned(),
        ];
        write(&config, settings.join("\n") + "\n")?;
        write(&apt.join("sources.list"), sources()?)?;
        let lists = Self { config };
        // Two set-ups in a row need not fetch them twice.
        let stamp = apt.join("fetched");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age > Duration::from_secs(3600)) {
            say("fetching Debian's package lists");
            run(lists.command("apt-get").args(["update", "--error-on=any", "-q"]))?;
            write(&stamp, "")?;
        }
        Ok(lists)
    }

    pub(super) fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }

    /// Downloads packages into a folder; apt checks them against the signed lists.
    pub(crate) fn download(&self, packages: &[String], folder: &Path) -> Result<()> {
        say(&format!("downloading {}", packages.join(" ")));
        run(self.command("apt-get").current_dir(folder).args(["download", "-q"]).args(packages))
            .with_context(|| format!("cannot download {}", packages.join(" ")))?;
        Ok(())
    }

    /// The names of the packages that one depends on directly, those on a list of alternatives included.
    pub(super) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let lines = run(self.command("apt-cache").args(["depends", "--important", package]))?;
        Ok(lines.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect())
    }

    /// The one direct dependency whose name starts so: a package whose name has a version in it.
    pub(super) fn depends_on(&self, package: &str, start: &str) -> Result<String> {
        self.depends(package)?
            .into_iter()
            .find(|name| name.starts_with(start))
            .with_context(|| format!("{package} no longer depends on a {start}* package"))
    }

    /// A package and all that it needs, less what every machine with a compiler has in its own version.
    pub(super) fn closure(&self, package: &str) -> Result<Vec<String>> {
        const HOST: [&str; 4] = ["libc6", "libgcc-s1", "libstdc++6", "gcc-12-base"];
        let lines = run(self.command("apt-cache").args(["depends", "--important", "--recurse", package]))?;
        Ok(lines
            .lines()
            .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()) && !line.contains(':'))
            .filter(|name| !HOST.contains(name))
            .map(str::to_owned)
            .collect())
    }
}

/// The package sources, from where the system takes its own.
pub(super) fn sources() -> Result<String> {
    let format = "$(REPO_URI)";
    let known = run(Command::new("apt-get").args(["indextargets", "--format", format, "Identifier: Packages"]))?;
    let mirror = |name: &str| known.lines().map(|uri| uri.trim_end_matches('/')).find(|uri| uri.ends_with(name));
    let main = mirror("/debian").context("apt knows no Debian mirror (a source whose address ends in /debian)")?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed = if Path::new(keyring).exists() { format!(" [signed-by={keyring}]") } else { String::new() };
    let mut sources = format!("deb{signed} {main} {RELEASE} main\ndeb-src{signed} {main} {BOCHS_RELEASE} main\n");
    if let Some(security) = mirror("/debian-security") {
        sources += &format!("deb{signed} {security} {RELEASE}-security main\n");
    }
    Ok(sources)
}

/// Unpacks all packages in a folder into a root, without installing them.
pub(super) fn unpack(packages: &Path, root: &Path) -> Result<()> {
    for package in files(packages)? {
        run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(root))?;
    }
    Ok(())
}

/// Unpacks some files of a package into a root: of a large package a few may be all that is needed.
pub(crate) fn unpack_files(package: &Path, root: &Path, files: &[&str]) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let stream = archive.stdout.take().context("dpkg-deb has no output")?;
    run(Command::new("tar").arg("-xC").arg(root).args(files).stdin(stream))?;
    archive.wait().context("dpkg-deb")?;
    Ok(())
}
