//! One run of `mpirun`, with a limit of time, and what its ranks wrote.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use libtest_mimic::Failed;

/// What a process is to do.
const ROLE: &str = "TILEFOLD_TEST_ROLE";
/// The folder for what ranks say.
const WORDS: &str = "TILEFOLD_TEST_WORDS";
/// Nothing hangs: every job ends within it, or is a failure.
const LIMIT: Duration = Duration::from_secs(60);
/// Time to end its processes, for a launcher that is told to.
const GRACE: Duration = Duration::from_secs(5);
/// Neither a root user nor more ranks than cores are a mistake here; Open MPI 4, and 5.
const ENVIRONMENT: [(&str, &str); 4] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
];

/// What each process of a job does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Role {
    Checks,
    Faults,
    Panic,
    Exit,
    Kill,
    KillUnderWay,
    NoRoom,
    Stop,
    Hang,
    Farewell,
    Foreign,
    Long,
}

const ROLES: [Role; 12] = [
    Role::Checks,
    Role::Faults,
    Role::Panic,
    Role::Exit,
    Role::Kill,
    Role::KillUnderWay,
    Role::NoRoom,
    Role::Stop,
    Role::Hang,
    Role::Farewell,
    Role::Foreign,
    Role::Long,
];

impl Role {
    pub(crate) fn of_this_process() -> Option<Self> {
        let name = env::var(ROLE).ok()?;
        ROLES.into_iter().find(|role| format!("{role:?}") == name)
    }
}

/// Keeps a rank's last word for the driver.
pub(crate) fn say(rank: usize, word: &str) {
    let folder = PathBuf::from(env::var_os(WORDS).unwrap());
    // Whole or not at all.
    let draft = folder.join(format!("{rank}.draft"));
    fs::write(&draft, word).unwrap();
    fs::rename(draft, folder.join(rank.to_string())).unwrap();
}

/// Processes to start.
#[derive(Debug)]
pub(crate) struct Job {
    ranks: usize,
    role: Role,
    environment: Vec<String>,
    under_mpirun: bool,
    surviving: bool,
}

/// How a job went.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) success: bool,
    /// By rank.
    pub(crate) words: Vec<Option<String>>,
    output: String,
    command: String,
}

impl Job {
    pub(crate) fn new(ranks: usize, role: Role) -> Self {
        Self { ranks, role, environment: Vec::new(), under_mpirun: true, surviving: false }
    }

    pub(crate) fn alone(role: Role) -> Self {
        Self { under_mpirun: false, ..Self::new(1, role) }
    }

    pub(crate) fn with(mut self, variable: &str, value: &str) -> Self {
        self.environment.push(format!("{variable}={value}"));
        self
    }

    /// With a launcher that does not end the job when a process is killed.
    pub(crate) fn surviving(self) -> Self {
        Self { surviving: true, ..self }
    }

    pub(crate) fn is_surviving(&self) -> bool {
        self.surviving
    }

    pub(crate) fn run(&self) -> Result<Done, Failed> {
        let folder = tempfile::tempdir()?;
        let output = folder.path().join("output");
        let mut command = self.command(folder.path())?;
        command.envs(ENVIRONMENT);
        command.stdout(File::create(&output)?).stderr(File::options().append(true).open(&output)?);
        let started = command.spawn().map_err(|error| format!("cannot start {:?}: {error}", command.get_program()))?;
        let status = wait(started)?;
        let words = (0..self.ranks).map(|rank| fs::read_to_string(folder.path().join(rank.to_string())).ok());
        let mut done = Done {
            success: status.is_some_and(|status| status.success()),
            words: words.collect(),
            output: String::from_utf8_lossy(&fs::read(output)?).into_owned(),
            command: format!("{command:?}"),
        };
        if status.is_none() {
            done.output += "\nit hangs: ended by the driver";
            return Err(done.unexpected(&format!("an end within {LIMIT:?}")));
        }
        Ok(done)
    }

    fn command(&self, words: &Path) -> io::Result<Command> {
        let mut command = Command::new("env");
        if self.under_mpirun {
            command = launcher();
            if self.surviving {
                command.arg("--enable-recovery");
            }
            // Launchers differ in which variables they pass on to other hosts.
            command.args(["-n", &self.ranks.to_string(), "env"]);
        }
        command.arg(format!("{ROLE}={:?}", self.role)).arg(format!("{WORDS}={}", words.display()));
        command.args(&self.environment).arg(env::current_exe()?);
        Ok(command)
    }
}

/// The program, and the arguments that follow it.
fn launcher() -> Command {
    let words = env::var("TILEFOLD_MPIRUN").unwrap_or_else(|_| "mpirun".into());
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("mpirun"));
    command.args(words);
    command
}

pub(crate) fn launcher_is_hydra() -> bool {
    let version = launcher().arg("--version").output();
    version.is_ok_and(|version| String::from_utf8_lossy(&version.stdout).contains("HYDRA"))
}

/// `None` when it had to be ended.
fn wait(mut job: Child) -> io::Result<Option<ExitStatus>> {
    let end = |job: &mut Child, limit: Duration| -> io::Result<Option<ExitStatus>> {
        let started = Instant::now();
        while started.elapsed() < limit {
            if let Some(status) = job.try_wait()? {
                return Ok(Some(status));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(None)
    };
    if let Some(status) = end(&mut job, LIMIT)? {
        return Ok(Some(status));
    }
    // A launcher that is told to end ends its processes.
    Command::new("kill").arg(job.id().to_string()).status()?;
    if end(&mut job, GRACE)?.is_none() {
        job.kill()?;
        job.wait()?;
    }
    Ok(None)
}

impl Done {
    pub(crate) fn unexpected(&self, expected: &str) -> Failed {
        let Self { success, words, output, command } = self;
        format!("expected: {expected}\n{command}\nsuccess: {success}\nwords: {words:#?}\noutput:\n{output}").into()
    }
}
