//! Splits PTX text into words, numbers, strings and punctuation, each with its line.

use crate::ParseError;

/// One token; words keep their dots, so that an opcode or `%tid.x` is one word.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind<'a> {
    Word(&'a str),
    Integer(u64),
    /// Bits of a `0f` literal.
    Float32(u32),
    /// Bits of a `0d` literal, or of a decimal fraction.
    Float64(u64),
    Text,
    Punctuation(char),
}

#[derive(Clone, Debug)]
pub(crate) struct Token<'a> {
    pub(crate) kind: Kind<'a>,
    pub(crate) line: u32,
    /// Byte range in the text.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

pub(crate) fn tokens(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1u32);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b if b.is_ascii_whitespace() || b == 0 => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at = text[at..].find('\n').map_or(bytes.len(), |n| at + n);
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at..].find("*/").map(|n| at + n + 2);
                let end = end.ok_or_else(|| ParseError::syntax(line, "a comment that never ends"))?;
                line += newlines(&text[at..end]);
                at = end;
                continue;
            }
            b'"' => {
                let end = text[at + 1..].find('"').map(|n| at + n + 2);
                at = end.ok_or_else(|| ParseError::syntax(line, "a string that never ends"))?;
                let from = line;
                line += newlines(&text[start..at]);
                found.push(Token { kind: Kind::Text, line: from, start, end: at });
                continue;
            }
            b if b.is_ascii_digit() => {
                at = end_of(bytes, at, |b| b.is_ascii_alphanumeric() || b == b'.');
                let kind = number(&text[start..at])
                    .ok_or_else(|| ParseError::syntax(line, &format!("the number `{}`", &text[start..at])))?;
                found.push(Token { kind, line, start, end: at });
                continue;
            }
            b if b.is_ascii_alphabetic() || b"_$%.".contains(&b) => {
                at = word_end(bytes, at + 1);
                let kind = Kind::Word(&text[start..at]);
                found.push(Token { kind, line, start, end: at });
                continue;
            }
            b if b.is_ascii_graphic() => at += 1,
            _ => return Err(ParseError::syntax(line, "a character outside ASCII")),
        }
        found.push(Token { kind: Kind::Punctuation(char::from(bytes[start])), line, start, end: at });
    }
    Ok(found)
}

fn newlines(text: &str) -> u32 {
    u32::try_from(text.matches('\n').count()).unwrap_or(u32::MAX)
}

fn end_of(bytes: &[u8], mut at: usize, belongs: impl Fn(u8) -> bool) -> usize {
    while at < bytes.len() && belongs(bytes[at]) {
        at += 1;
    }
    at
}

/// `::` belongs to a word (`.L2::128B`), a single `:` ends a label.
fn word_end(bytes: &[u8], mut at: usize) -> usize {
    loop {
        at = end_of(bytes, at, |b| b.is_ascii_alphanumeric() || b"_$.".contains(&b));
        if bytes.get(at..at + 2) != Some(b"::") {
            return at;
        }
        at += 2;
    }
}

fn number(text: &str) -> Option<Kind<'static>> {
    if let Some(bits) = text.strip_prefix("0f").or_else(|| text.strip_prefix("0F")) {
        return (bits.len() == 8).then(|| u32::from_str_radix(bits, 16).ok().map(Kind::Float32))?;
    }
    if let Some(bits) = text.strip_prefix("0d").or_else(|| text.strip_prefix("0D")) {
        return (bits.len() == 16).then(|| u64::from_str_radix(bits, 16).ok().map(Kind::Float64))?;
    }
    let digits = text.trim_end_matches('U');
    if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok().map(Kind::Integer);
    }
    if let Some(binary) = digits.strip_prefix("0b").or_else(|| digits.strip_prefix("0B")) {
        return u64::from_str_radix(binary, 2).ok().map(Kind::Integer);
    }
    if digits.contains('.') {
        return digits.parse().ok().map(|value: f64| Kind::Float64(value.to_bits()));
    }
    if digits.len() > 1 && digits.starts_with('0') {
        return u64::from_str_radix(digits, 8).ok().map(Kind::Integer);
    }
    digits.parse().ok().map(Kind::Integer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<Kind<'_>> {
        tokens(text).unwrap().into_iter().map(|t| t.kind).collect()
    }

    #[test]
    fn words_keep_dots_and_labels_lose_colons() {
        assert_eq!(
            kinds("$L__BB0_3: ld.global.L1::no_allocate.u32 %tid.x"),
            [
                Kind::Word("$L__BB0_3"),
                Kind::Punctuation(':'),
                Kind::Word("ld.global.L1::no_allocate.u32"),
                Kind::Word("%tid.x")
            ]
        );
    }

    #[test]
    fn numbers_of_every_form() {
        assert_eq!(
            kinds("12 0x1F 0b101 017 5U 0f3F800000 0d3FF0000000000000 1.5"),
            [
                Kind::Integer(12),
                Kind::Integer(31),
                Kind::Integer(5),
                Kind::Integer(15),
                Kind::Integer(5),
                Kind::Float32(0x3F80_0000),
                Kind::Float64(1f64.to_bits()),
                Kind::Float64(1.5f64.to_bits())
            ]
        );
    }

    #[test]
    fn lines_count_through_comments() {
        let found = tokens("a /* x\ny */ b // c\nd").unwrap();
        assert_eq!(found.iter().map(|t| t.line).collect::<Vec<_>>(), [1, 2, 3]);
    }
}
