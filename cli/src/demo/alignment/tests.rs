//! What the three formats must read as, which files must be refused and why, and that no bytes make the reader panic.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const KINASE: &str = include_str!("../../../../examples/data/PF00069_seed.sto");
const FIBRONECTIN: &str = include_str!("../../../../examples/data/PF00041_seed.sto");

fn read(text: &str) -> Alignment {
    Alignment::parse(text, "in.txt").unwrap()
}

fn rows(alignment: &Alignment) -> Vec<&str> {
    alignment.rows().iter().map(|row| std::str::from_utf8(row).unwrap()).collect()
}

/// Writes A3M with as many `a`s as each deletion count says.
fn to_a3m(alignment: &Alignment) -> String {
    let mut text = String::new();
    for ((name, row), deletions) in alignment.names().iter().zip(alignment.rows()).zip(alignment.deletions()) {
        text.push_str(&format!(">{name} from a test\n"));
        for (&symbol, &count) in row.iter().zip(deletions) {
            text.push_str(&"a".repeat(usize::try_from(count).unwrap()));
            text.push(char::from(symbol));
        }
        text.push('\n');
    }
    text
}

/// Splits every row of a one-block Stockholm file into blocks of `width` columns.
fn wrap(text: &str, width: usize) -> String {
    let rows: Vec<(&str, &str)> = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.starts_with("//"))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, residues)| (name, residues.trim()))
        .collect();
    let mut wrapped = String::from("# STOCKHOLM 1.0\n");
    for start in (0..rows[0].1.len()).step_by(width) {
        wrapped.push('\n');
        for (name, residues) in &rows {
            wrapped.push_str(&format!("{name}  {}\n", &residues[start..residues.len().min(start + width)]));
        }
        wrapped.push_str("#=GC RF xxxx\n");
    }
    wrapped + "//\n"
}

#[test]
fn pfam_seeds_have_the_counts_found_by_another_program() {
    // (rows, match columns, inserted residues, longest insertion, gaps), counted by a script that shares no code.
    for (text, expected) in [(KINASE, (38, 259, 791, 36, 477)), (FIBRONECTIN, (98, 84, 299, 10, 336))] {
        let alignment = read(text);
        let inserted: u32 = alignment.deletions().iter().flatten().sum();
        let longest = *alignment.deletions().iter().flatten().max().unwrap();
        let gaps = alignment.rows().iter().flatten().filter(|&&symbol| symbol == GAP).count();
        assert_eq!((alignment.n_seq(), alignment.n_columns(), inserted, longest, gaps), expected);
    }
    let kinase = read(KINASE);
    assert_eq!(kinase.names()[0], "CDC15_YEAST/25-272");
    assert!(rows(&kinase)[0].starts_with("YHLKQVIGRGSYGVVYKAINKHTDQVVAIKEVVYENDEEL"));
}

#[test]
fn wrapping_line_ends_blanks_and_case_do_not_change_a_stockholm_file() {
    let expected = read(KINASE);
    assert_eq!(read(&wrap(KINASE, 50)), expected);
    assert_eq!(read(&KINASE.replace('\n', "\r\n")), expected);
    assert_eq!(read(&KINASE.replace('\n', "  \t\n")), expected);
    assert_eq!(read(&format!("\u{feff}\n{KINASE}\n\n")), expected);
    assert_eq!(read(&wrap(KINASE, 60).to_lowercase().replace("# stockholm", "# STOCKHOLM")).rows(), expected.rows());
}

#[test]
fn a3m_gives_back_rows_and_deletions() {
    for text in [KINASE, FIBRONECTIN] {
        let expected = read(text);
        assert_eq!(read(&to_a3m(&expected)), expected);
    }
}

#[test]
fn stockholm_columns_with_half_or_more_gaps_become_deletions() {
    let alignment = read("# STOCKHOLM 1.0\na AC-DE\nb A-GDe\nc -.GD.\nd ..G.*\n//\n");
    // Gaps by column: 2 3 1 1 2 of 4, so only the third and fourth stay.
    assert_eq!(rows(&alignment), ["-D", "GD", "GD", "G-"]);
    assert_eq!(alignment.deletions(), [[2, 0], [1, 0], [0, 0], [0, 0]]);
}

#[test]
fn a3m_drops_padding_and_counts_lower_case() {
    let alignment = read("#2 1\n>q\nAC..D\n\n>h1 hit\naAC\nxyD\n>h1\r\n-C.zD.k\r\n");
    assert_eq!(alignment.names(), ["q", "h1", "h1"]);
    assert_eq!(rows(&alignment), ["ACD", "ACD", "-CD"]);
    assert_eq!(alignment.deletions(), [[0, 0, 0], [1, 0, 2], [0, 0, 1]]);
}

#[test]
fn fasta_keeps_every_column_and_every_letter() {
    let alignment = read(">q\nUOBZJ\nX*.\n>h\n-_~ACD E\nF\n");
    assert_eq!(rows(&alignment), ["UOBZJX--", "---ACDEF"]);
    assert!(alignment.deletions().iter().flatten().all(|&count| count == 0));
}

#[test]
fn each_malformed_file_is_refused_with_its_place_and_fix() {
    let cases = [
        ("", "in.txt is empty"),
        (" \r\n\t\n", "in.txt is empty"),
        ("# STOCKHOLM 1.0\n\n//\n", "has a header but no sequences"),
        ("# only a comment\n", "has a header but no sequences"),
        ("\na ACD\n//\n", "line 2: no header; start the file with"),
        ("#=GF ID x\na ACD\n//\n", "line 2: no header"),
        ("# STOCKHOLM 1.0\n", "line 1: the file ends without the `//`"),
        ("# STOCKHOLM 1.0\na ACD\n", "line 2: the file ends without the `//`"),
        ("# STOCKHOLM 1.0\na A\n//\n\n# STOCKHOLM 1.0\n", "line 5: text after the first alignment"),
        ("# STOCKHOLM 1.0\na A\n# STOCKHOLM 1.0\n//\n", "line 3: text after the first alignment"),
        ("# STOCKHOLM 1.0\n ACD\n//\n", "line 2: sequence without a name"),
        (">\nACD\n", "line 1: sequence without a name"),
        ("# STOCKHOLM 1.0\na\n//\n", "line 2: sequence a has no residues"),
        (">a\nACD\n>b\n\n>c\nACD\n", "line 3: sequence b has no residues"),
        ("# STOCKHOLM 1.0\na A\nb C\na D\n//\n", "line 4: sequence a was already given on line 2"),
        ("# STOCKHOLM 1.0\na  AC3\n//\n", "line 2, column 6: character '3' is neither"),
        (">a\nAC\nAC\u{e9}\n", "line 3, column 3: character 'é' is neither"),
        ("# STOCKHOLM 1.0\na AC\nb ACD\n//\n", "line 3: sequence b has 3 columns, expected 2"),
        ("# STOCKHOLM 1.0\na AC\nb AC\n\na DE\n//\n", "line 3: sequence b has 2 columns, expected 4"),
        (">a\nACD\n>b\nACaDE\n", "line 3: sequence b has 4 match columns, expected 3"),
        (">a\nacd\n", "no match columns"),
        ("# STOCKHOLM 1.0\na A-\nb -C\n//\n", "no match columns"),
        (">a\n---\n>b\n---\n", "only gaps in its match columns"),
        (">a\n--\n>b\n-ac-\n", "only gaps in its match columns"),
    ];
    for (text, expected) in cases {
        let message = Alignment::parse(text, "in.txt").unwrap_err().to_string();
        assert!(message.contains(expected), "{text:?} gave {message:?}, expected {expected:?}");
        assert!(message.starts_with("alignment in.txt"), "{message}");
    }
}

#[test]
fn unreadable_oversized_and_binary_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Alignment::read(&folder.path().join("none.sto")).unwrap_err();
    assert!(missing.to_string().contains("none.sto"), "{missing}");
    assert!(Alignment::read(folder.path()).is_err());

    let path = folder.path().join("kinase.sto");
    std::fs::write(&path, KINASE).unwrap();
    assert_eq!(Alignment::read(&path).unwrap(), read(KINASE));
    let size = u64::try_from(KINASE.len()).unwrap();
    assert!(read_at_most(&path, size).is_ok());
    assert!(matches!(read_at_most(&path, size - 1), Err(AlignmentError::TooLarge { .. })));

    let binary = Alignment::from_bytes(b"# STOCKHOLM 1.0\na AC\xffD\n//\n", "b").unwrap_err();
    assert!(matches!(binary, AlignmentError::NotUtf8 { line: 2, .. }), "{binary}");
}

/// Changes a few places of `bytes`: single bytes, cut or doubled ranges, foreign bits of syntax.
fn mutate(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    const SYNTAX: [&[u8]; 8] = [b"\n", b"//\n", b">", b"# STOCKHOLM 1.0\n", b"\n\n", b"a ", b"\xc3\x28", b"\0"];
    for _ in 0..rng.random_range(1..4) {
        let start = rng.random_range(0..=bytes.len());
        let end = bytes.len().min(start + rng.random_range(0..200));
        match rng.random_range(0..5) {
            0 => drop(bytes.drain(start..end)),
            1 => bytes.truncate(start),
            2 => drop(bytes.splice(start..start, SYNTAX[rng.random_range(0..SYNTAX.len())].iter().copied())),
            3 => bytes.splice(start..start, bytes[start..end].to_vec()).for_each(drop),
            _ => bytes[start..end].iter_mut().take(2).for_each(|byte| *byte = rng.random()),
        }
    }
}

#[test]
fn mutated_files_never_panic_and_what_is_read_is_rectangular() {
    const SEED: u64 = 20_210_715;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let files = [KINASE.to_owned(), FIBRONECTIN.to_owned(), wrap(FIBRONECTIN, 40), to_a3m(&read(FIBRONECTIN))];
    let (mut read_well, mut refused) = (0, 0);
    for round in 0..4000 {
        let mut bytes = files[round % files.len()].clone().into_bytes();
        mutate(&mut bytes, &mut rng);
        match Alignment::from_bytes(&bytes, "mutated") {
            Ok(alignment) => {
                read_well += 1;
                let width = alignment.n_columns();
                assert!(width > 0 && alignment.rows().iter().all(|row| row.len() == width), "{SEED} {round}");
                assert!(alignment.deletions().iter().all(|row| row.len() == width), "{SEED} {round}");
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("alignment mutated"), "{SEED} {round}: {error}");
            }
        }
    }
    assert!(read_well > 200 && refused > 1000, "seed {SEED}: {read_well} read, {refused} refused");
}
