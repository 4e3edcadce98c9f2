//! demo.

use std::fs;

use crate::{failure, json, stdout};

const SMALL: &str = "# STOCKHOLM 1.0\nfirst ACDEF-GHIK\nsecond AC-EFYGHLK\nthird ACDEFYG-IK\n//\n";

#[test]
fn demo_computes_and_checks_the_four_variants() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small.sto");
    fs::write(&file, SMALL).unwrap();
    let out = folder.path().to_str().unwrap();
    let report = json(&["demo", file.to_str().unwrap(), "--no-paper-size", "--out", out, "--json"]);
    assert_eq!(
        (&report["passed"], &report["alignment"]["n_seq"], &report["alignment"]["n_res"]),
        (&true.into(), &3.into(), &10.into())
    );
    let cases = report["cases"].as_array().unwrap();
    let names: Vec<_> = cases.iter().map(|case| case["variant"].as_str().unwrap()).collect();
    assert_eq!(names, ["msa_row", "msa_column", "triangle_starting", "triangle_ending"]);
    for case in cases {
        assert!(case["forward_ms"].as_f64().unwrap() > 0.0 && case["backward_ms"].as_f64().unwrap() > 0.0);
        let checked: Vec<_> =
            case["checks"].as_array().unwrap().iter().map(|check| check["tensor"].as_str().unwrap()).collect();
        let expected: &[&str] = if case["variant"] == "msa_column" {
            &["out", "dq", "dgate", "dk", "dv"]
        } else {
            &["out", "dq", "dgate", "dk", "dv", "dbias"]
        };
        assert_eq!(checked, expected);
        // Rounding explains the errors, and is seen: the oracle is another computation.
        let share = case["of_tolerance"].as_f64().unwrap();
        assert!((1e-6..1.0).contains(&share), "{case}");
    }
    assert!(fs::read_to_string(folder.path().join("tilefold-demo.svg")).unwrap().contains("triangle ending"));
}

#[test]
fn demo_prints_a_table_for_a3m_and_one_sequence_alike() {
    let folder = tempfile::tempdir().unwrap();
    let (file, svg) = (folder.path().join("one.a3m"), folder.path().join("picture.svg"));
    for text in [">only\nACDEFGH\n", ">a\nACDEF\n>b\nAC-EgghF\n"] {
        fs::write(&file, text).unwrap();
        let args = ["demo", file.to_str().unwrap(), "--no-paper-size", "--out", svg.to_str().unwrap()];
        let table = stdout(&args);
        assert!(table.contains("logits avoided") && table.contains(" ok") && !table.contains("FAIL"), "{table}");
        assert!(svg.is_file());
    }
}

#[test]
fn malformed_alignments_are_refused_with_file_line_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.sto");
    let path = file.to_str().unwrap();
    for (bytes, part) in [
        (SMALL.replace("ACDEFYG-IK", "ACDEF").into_bytes(), "line 4: sequence third has 5 columns, expected 10"),
        (SMALL.replace("//\n", "").into_bytes(), "without the `//` terminator"),
        (SMALL.replace("-G", "7G").into_bytes(), "line 2, column 12: character '7'"),
        (b"".to_vec(), "is empty"),
        (b"ACDEF\n".to_vec(), "line 1: no header"),
        (vec![0x1f, 0x8b, 0xff, 0x00], "not UTF-8"),
        (b">a\n---\n>b\n---\n".to_vec(), "only gaps"),
    ] {
        fs::write(&file, bytes).unwrap();
        let message = failure(1, &["demo", path, "--no-paper-size", "--out", folder.path().to_str().unwrap()]);
        assert!(message.contains(path) && message.contains(part), "{part}: {message}");
        assert!(!folder.path().join("tilefold-demo.svg").exists());
    }
    let absent = failure(1, &["demo", "absent.sto", "--out", folder.path().to_str().unwrap()]);
    assert!(absent.contains("absent.sto"), "{absent}");
    assert!(failure(1, &["demo", path, "--out", "no/such/folder"]).contains("--out: cannot write no/such/folder"));
}

#[test]
fn an_alignment_too_large_for_the_machine_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("long.fa");
    fs::write(&file, format!(">long\n{}\n", "A".repeat(60_000))).unwrap();
    let args = ["demo", file.to_str().unwrap(), "--no-paper-size", "--out", folder.path().to_str().unwrap()];
    let output = crate::tilefold(&args);
    assert_eq!(output.status.code(), Some(1));
    let message = crate::text(&output.stderr);
    for part in ["for 1 x 60000 residues needs", "TB of memory, and", "are available"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_the_system_refuses_is_an_error_and_no_abort() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wide.fa");
    let row = "ACDEFGHIKLMNPQRSTVWY".repeat(30);
    fs::write(&file, (0..400).map(|row_of| format!(">{row_of}\n{row}\n")).collect::<String>()).unwrap();
    // Named, since drivers of other devices that are looked for do not all survive so little memory.
    let program = [env!("CARGO_BIN_EXE_tilefold"), "--device", "cpu", "--threads", "2", "demo"];
    let output = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 400000; exec \"$@\"", "sh"])
        .args(program)
        .args([file.as_path(), "--no-paper-size".as_ref(), "--out".as_ref(), folder.path()])
        .output()
        .unwrap();
    let message = crate::text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.starts_with("error: ") && message.contains("no memory for"), "{message}");
}
