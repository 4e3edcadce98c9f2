//! Ranks as processes under `mpirun`: what every engine must do, and what happens when a rank fails or dies.
//!
//! Started plainly, this program is the driver: it starts itself under `mpirun` (`TILEFOLD_MPIRUN` names another, which
//! must be of the MPI library this was built with), and reads what each rank has written into a file of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic is a failed test")]

#[path = "../checks/mod.rs"]
mod checks;
mod faults;
mod job;

use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tilefold_comm::{CommError, Communicator, Error};

use job::{Job, Role};

/// Rank 1 is the one that fails; the deadline of the others.
const DEADLINE: Duration = Duration::from_secs(4);

fn main() {
    if let Some(role) = Role::of_this_process() {
        return faults::play(role);
    }
    let mut arguments = Arguments::from_args();
    // Each job has processes enough for the machine.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials()).exit();
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("collectives/without_mpirun", || all_well(Job::alone(Role::Checks))),
        Trial::test("collectives/in_tiny_chunks", || {
            all_well(Job::new(3, Role::Checks).with("TILEFOLD_MPI_CHUNK_BYTES", "5"))
        }),
        Trial::test("faults/the_processes_live", || all_well(Job::new(3, Role::Faults))),
        Trial::test("faults/a_process_panics", || {
            dies(Job::new(3, Role::Panic), |error| matches!(error, CommError::Lost { rank: 1, panicked: true, .. }))
        }),
        Trial::test("faults/a_process_exits", || {
            dies(Job::new(3, Role::Exit), |error| matches!(error, CommError::Lost { rank: 1, panicked: false, .. }))
        }),
        Trial::test("faults/a_process_is_killed", || killed(Role::Kill)),
        Trial::test("faults/a_process_is_killed_while_it_sends", || killed(Role::KillUnderWay)),
        Trial::test("faults/mpi_is_in_use_already", || all_well(Job::new(2, Role::Foreign))),
        Trial::test("faults/a_process_stops", || dies(Job::new(3, Role::Stop), of_rank_1)),
        Trial::test("faults/a_process_hangs", || dies(Job::new(3, Role::Hang), of_rank_1)),
        Trial::test("exit/what_was_sent_before_it_arrives", || all_well(Job::new(3, Role::Farewell))),
        Trial::test("exit/a_process_that_computes_longer_is_waited_for", || all_well(Job::new(2, Role::Long))),
    ];
    if cfg!(target_os = "linux") {
        trials.push(Trial::test("faults/a_process_has_no_room_for_what_comes", no_room));
    }
    // Hydra, of MPICH, ends the job whatever it is told.
    if !job::launcher_is_hydra() {
        trials.extend([("", Role::Kill), ("_while_it_sends", Role::KillUnderWay)].map(|(when, role)| {
            let name = format!("faults/a_process_is_killed{when}_and_the_launcher_lets_the_others_live");
            Trial::test(name, move || killed_alone(role))
        }));
    }
    trials.extend([1, 2, 3, 5].map(|ranks| {
        Trial::test(format!("collectives/{ranks}_processes"), move || all_well(Job::new(ranks, Role::Checks)))
    }));
    trials
}

/// Every rank says `ok`, and so does the launcher.
fn all_well(job: Job) -> Result<(), Failed> {
    let done = job.run()?;
    if done.success && done.words == vec![Some("ok".to_owned()); done.words.len()] {
        return Ok(());
    }
    Err(done.unexpected("every rank says ok"))
}

/// Rank 1 says nothing; each other has the error, within its deadline; the job fails.
fn dies(job: Job, expected: impl Fn(&CommError) -> bool) -> Result<(), Failed> {
    let done = job.run()?;
    // A launcher that was told to let the others live does not say how they ended.
    let failed = !done.success || job.is_surviving();
    let as_expected = |(rank, word): (usize, &Option<String>)| match word {
        Some(word) => rank != 1 && faults::read_error(word).is_some_and(|error| expected(&error)),
        None => rank == 1,
    };
    if failed && done.words.iter().enumerate().all(as_expected) {
        return Ok(());
    }
    Err(done.unexpected("every rank but 1 has the typed error, and the job has failed"))
}

/// Launchers end a job when one of its processes is killed: a rank that has the time to say anything has an error.
fn killed(role: Role) -> Result<(), Failed> {
    let done = Job::new(3, role).run()?;
    let has_error = |word: &Option<String>| word.as_ref().is_none_or(|word| faults::read_error(word).is_some());
    if !done.success && done.words.iter().all(has_error) {
        return Ok(());
    }
    Err(done.unexpected("the job ends, and nobody takes the killed rank's part for done"))
}

/// The others find out by their deadline, or earlier from MPI, and end the job, which nobody else would.
fn killed_alone(role: Role) -> Result<(), Failed> {
    let job = Job::new(3, role).surviving();
    dies(job, |error| of_rank_1(error) || matches!(error, CommError::Driver { .. }))
}

/// All ranks have the error of the one that cannot receive, and the job ends.
fn no_room() -> Result<(), Failed> {
    let done = Job::new(3, Role::NoRoom).run()?;
    let is_told = |word: &Option<String>| {
        let error = word.as_deref().and_then(faults::read_error);
        matches!(error, Some(CommError::Driver { message, .. }) if message.contains("Tensor::zeros"))
    };
    if done.words.iter().all(is_told) { Ok(()) } else { Err(done.unexpected("Tensor::zeros has failed on every rank")) }
}

/// A deadline that only rank 1 has missed.
fn of_rank_1(error: &CommError) -> bool {
    matches!(error, CommError::Deadline { missing, .. } if *missing == [1])
}

/// The error of a communicator, or what else there was.
fn comm_error(result: tilefold_comm::Result<()>) -> Result<CommError, String> {
    match result {
        Err(Error::Comm(error)) => Ok(error),
        other => Err(format!("{other:?}")),
    }
}

/// The group of all processes, which no test leaves without a deadline of its own.
fn world() -> Communicator {
    let comm = Communicator::mpi().unwrap();
    comm.set_deadline(DEADLINE).unwrap();
    comm
}
