//! Two hosts for a launcher of MPI: network namespaces of this machine, joined by a cable, each with a name of its own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::command::{run, succeeds};
use crate::report::Count;
use crate::setup;

/// Namespaces, which are also the hosts' names; their ends of the cable; their addresses.
const HOSTS: [(&str, &str, &str); 2] =
    [("tilefold-a", "tilefold0", "198.18.0.1"), ("tilefold-b", "tilefold1", "198.18.0.2")];
const NETWORK: &str = "198.18.0.0/24";

/// Both, until dropped.
#[derive(Debug)]
pub(crate) struct Hosts(());

/// Whether this user may make network namespaces.
pub(crate) fn are_possible() -> bool {
    cfg!(target_os = "linux") && succeeds(&["unshare", "--net", "--uts", "mount", "--make-rprivate", "/"])
}

impl Hosts {
    pub(crate) fn new() -> Result<Self> {
        // It knows no `--version`.
        if !succeeds(&["ip", "-V"]) {
            setup::packages(&["iproute2"])?;
        }
        // Left by a run that was killed.
        delete();
        let hosts = Self(());
        let [(a, cable, _), (b, end, _)] = HOSTS;
        for host in [a, b] {
            run(&[], &["ip", "netns", "add", host])?;
        }
        let pair = ["ip", "link", "add", cable, "netns", a, "type", "veth", "peer", "name", end, "netns", b];
        run(&[], &pair)?;
        for (host, cable, address) in HOSTS {
            let ip = |words: &[&str]| run(&[], &[&["ip", "-netns", host], words].concat());
            ip(&["address", "add", &format!("{address}/24"), "dev", cable])?;
            ip(&["link", "set", "lo", "up"])?;
            ip(&["link", "set", cable, "up"])?;
        }
        Ok(hosts)
    }

    /// Runs a command on the first host; `mpirun`, Open MPI's, starts processes on both by turns.
    pub(crate) fn run(&self, mpirun: &str, command: &[&str]) -> Result<Count> {
        let agent = agent()?;
        let hosts = HOSTS.map(|(_, _, address)| format!("{address}:4")).join(",");
        // Its shared memory would reach from one namespace into the other.
        let launcher = format!(
            "{mpirun} --host {hosts} --map-by node --mca plm_rsh_agent {agent} --mca pml ob1 --mca btl tcp,self \
             --mca btl_tcp_if_include {NETWORK} --mca oob_tcp_if_include {NETWORK}"
        );
        run(&[("TILEFOLD_MPIRUN", &launcher)], &[&[&agent, HOSTS[0].2], command].concat())
    }
}

/// What ssh is elsewhere: runs a command on the host with an address.
fn agent() -> Result<String> {
    let folder = Path::new("target").join("xtask");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file = std::path::absolute(folder.join("on-host")).context("no working folder")?;
    let cases = HOSTS.map(|(host, _, address)| format!("{address}) host={host};;")).join(" ");
    let script = format!(
        "#!/bin/sh\ncase \"$1\" in {cases} *) exit 1;; esac\nshift\n\
         exec ip netns exec $host unshare --uts sh -c \"hostname $host; $*\"\n"
    );
    fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
    let file = file.into_os_string().into_string().ok().context("a folder whose name is no text")?;
    run(&[], &["chmod", "+x", &file])?;
    Ok(file)
}

fn delete() {
    for (host, _, _) in HOSTS {
        succeeds(&["ip", "netns", "delete", host]);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        delete();
    }
}
