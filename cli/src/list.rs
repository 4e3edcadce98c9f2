//! Lists on the command line: `128,256` and the names of dtypes.

use anyhow::{Result, bail};
use tilefold::Precision;

/// A dtype q may have, by name; `tf32` is f32 whose products may be of tf32.
pub(crate) fn dtype(name: &str) -> Result<Precision, String> {
    name.parse()
}

/// Bytes with an optional unit: `16GiB`, `12.5 GB`, `1048576`.
pub(crate) fn memory_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let (number, factor) = unit.map_or((text, 1.0), |(unit, factor)| (&text[..text.len() - unit.len()], *factor));
    let bytes = number.trim().parse::<f64>().ok().map(|number| number * factor);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive and below 2^63")]
    match bytes {
        Some(bytes) if (1.0..9e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err(format!("expected a size such as 16GiB, 12.5GB or 1048576, got `{text}`")),
    }
}

/// Exactly four sizes: rows, seqlen, heads, head_dim.
pub(crate) fn shape(sizes: &[usize]) -> Result<[usize; 4]> {
    match <[usize; 4]>::try_from(sizes) {
        Ok(shape) => Ok(shape),
        Err(_) => bail!("--shape: expected rows,seqlen,heads,head_dim such as 128,256,8,32, got {} sizes", sizes.len()),
    }
}

#[cfg(test)]
mod tests {
    use tilefold::DType;

    use super::*;

    #[test]
    fn sizes_have_units() {
        let cases =
            [("16GiB", 17_179_869_184), ("12.5GB", 12_500_000_000), ("1048576", 1_048_576), ("2 kB", 2000), ("7B", 7)];
        for (text, expected) in cases {
            assert_eq!(memory_bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GiB", "-1GB", "0", "1e30", "nan", "16 Gb"] {
            assert!(memory_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn dtypes_are_those_of_q() {
        assert_eq!(dtype("bf16"), Ok(Precision::exact(DType::BF16)));
        assert_eq!(dtype("tf32"), Ok(Precision::TF32));
        assert!(dtype("bool").is_err() && dtype("F32").is_err());
    }
}
