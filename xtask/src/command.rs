//! Running commands: shown before they run, their tests counted, repeatable when they fail.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::report::Count;

/// A command that failed, with what to type to see it again.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) repeat: String,
    pub(crate) count: Count,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "to repeat it:\n    {}", self.repeat)
    }
}

impl std::error::Error for Failed {}

/// Runs a command with extra environment variables, passing its output on.
///
/// Counts the tests of every `test result:` line, and keeps every `skipped TRIAL: REASON`; a command without a result
/// counts as one check, and one in which no test was chosen is an error.
pub(crate) fn run(environment: &[(&str, &str)], command: &[&str]) -> Result<Count> {
    let repeat = spell(environment, command);
    println!("$ {repeat}");
    let (program, arguments) = command.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let (mut count, mut has_tests) = (Count::default(), false);
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.with_context(|| format!("cannot read what {program} prints"))?;
            // Another command may print at the same time: each has the terminal for a line.
            std::io::stdout().write_all(&[&line[..], b"\n"].concat()).context("cannot print")?;
            let line = String::from_utf8_lossy(&line);
            has_tests |= line.contains("test result: ");
            count += tests_of(&line);
            count.skips.extend(skip_of(&line));
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    if !status.success() {
        return Err(Failed { repeat, count }.into());
    }
    match count == Count::default() {
        true if has_tests => bail!("no test has a name that was asked for: {repeat}"),
        true => Ok(Count::one()),
        false => Ok(count),
    }
}

/// What a command prints.
pub(crate) fn output(command: &[&str]) -> Result<Vec<u8>> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        return Err(Failed { repeat: spell(&[], command), count: Count::default() }.into());
    }
    Ok(output.stdout)
}

/// Something that cargo built.
#[derive(Debug, Deserialize)]
pub(crate) struct Artifact {
    pub(crate) target: Target,
    /// The program, where it is one.
    pub(crate) executable: Option<String>,
    pub(crate) filenames: Vec<String>,
}

/// What it is of.
#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    pub(crate) name: String,
}

/// What a cargo command builds, or has built before.
pub(crate) fn artifacts(arguments: &[&str]) -> Result<Vec<Artifact>> {
    let messages = output(&[&["cargo"], arguments, &["--message-format", "json"]].concat())?;
    let lines = messages.split(|&byte| byte == b'\n');
    // Messages of other kinds have other fields.
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

/// Whether a command runs and succeeds, in silence.
pub(crate) fn succeeds(command: &[&str]) -> bool {
    let Some((program, arguments)) = command.split_first() else { return false };
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn spell(environment: &[(&str, &str)], command: &[&str]) -> String {
    let quoted = |word: &str| if word.contains([' ', '*']) { format!("'{word}'") } else { word.to_owned() };
    let variables = environment.iter().map(|(name, value)| format!("{name}={}", quoted(value)));
    variables.chain(command.iter().map(|word| quoted(word))).collect::<Vec<_>>().join(" ")
}

/// The trial and the reason of a line such as `skipped cuda:0 device: no driver`.
fn skip_of(line: &str) -> Option<String> {
    line.strip_prefix("skipped ").filter(|rest| rest.contains(": ")).map(str::to_owned)
}

/// The numbers of a line such as `test result: ok. 19 passed; 0 failed; 0 ignored; ...`.
fn tests_of(line: &str) -> Count {
    let Some((_, result)) = line.split_once("test result: ") else { return Count::default() };
    let number = |unit: &str| {
        let words: Vec<&str> = result.split_whitespace().collect();
        let pair = words.windows(2).find(|pair| pair[1].trim_end_matches(';') == unit);
        pair.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
    };
    Count { passed: number("passed"), failed: number("failed"), skipped: number("ignored"), skips: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_results_are_counted() {
        let line = "test result: FAILED. 17 passed; 2 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.03s";
        assert_eq!(tests_of(line), Count { passed: 17, failed: 2, skipped: 3, ..Count::default() });
        assert_eq!(tests_of("running 19 tests"), Count::default());
        assert_eq!(skip_of("skipped cuda device: no driver").as_deref(), Some("cuda device: no driver"));
        assert_eq!(skip_of("3 tests skipped: none"), None);
    }

    #[test]
    fn a_failure_says_how_to_repeat_it() {
        let error = run(&[("X", "a b")], &["sh", "-c", "exit 3"]).unwrap_err();
        assert_eq!(error.to_string(), "to repeat it:\n    X='a b' sh -c 'exit 3'");
        assert_eq!(run(&[], &["true"]).unwrap(), Count::one());
        let none = run(&[], &["echo", "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured"]).unwrap_err();
        assert!(none.to_string().contains("no test"), "{none}");
        assert!(succeeds(&["true"]) && !succeeds(&["false"]) && !succeeds(&["no-such-program"]));
    }
}
