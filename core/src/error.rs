//! Typed errors: a caller's mistake, a device's failure, a device that cannot be opened.

use thiserror::Error;

use crate::{DType, DeviceId, Products};

/// The caller's mistake, found before a device is touched.
///
/// Every variant names the tensor or parameter, and the dimension where there is one, with what was expected and what
/// came.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// A dimension is 0.
    #[error("{tensor}: {dimension} is 0; every dimension must be at least 1")]
    ZeroSize {
        /// The tensor.
        tensor: &'static str,
        /// The dimension.
        dimension: &'static str,
    },
    /// A tensor has the wrong number of dimensions.
    #[error("{tensor}: expected {expected} dimensions, got {got}")]
    Rank {
        /// The tensor.
        tensor: &'static str,
        /// Dimensions the contract asks for.
        expected: usize,
        /// Dimensions of the tensor given.
        got: usize,
    },
    /// A dimension has the wrong size.
    #[error("{tensor}: {dimension} must be {expected}, got {got}")]
    Shape {
        /// The tensor.
        tensor: &'static str,
        /// The dimension.
        dimension: &'static str,
        /// Its size by the problem.
        expected: usize,
        /// Its size in the tensor given.
        got: usize,
    },
    /// A dimension is neither 1 nor the full size.
    #[error("{tensor}: {dimension} must be 1 or {expected} to broadcast, got {got}")]
    NotBroadcastable {
        /// The tensor.
        tensor: &'static str,
        /// The dimension.
        dimension: &'static str,
        /// The full size.
        expected: usize,
        /// Its size in the tensor given.
        got: usize,
    },
    /// A dtype the contract does not have in this place.
    #[error("{tensor}: dtype must be {expected}, got {got}")]
    UnsupportedDType {
        /// The tensor.
        tensor: &'static str,
        /// The dtypes that would do.
        expected: String,
        /// The dtype given.
        got: DType,
    },
    /// The factors of products may be rounded in f32 alone.
    #[error("products: {products} is for dtype f32, got {dtype}; leave it at exact")]
    ProductsOfDType {
        /// What was asked for.
        products: Products,
        /// The dtype of q.
        dtype: DType,
    },
    /// A product of sizes or strides does not fit 63 bits.
    #[error("{tensor}: {quantity} overflows 63 bits; use smaller dimensions")]
    Overflow {
        /// The tensor.
        tensor: &'static str,
        /// What overflowed.
        quantity: &'static str,
    },
    /// The host has no memory for a new tensor.
    #[error("{tensor}: no memory for {bytes} bytes")]
    OutOfMemory {
        /// The tensor.
        tensor: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// Strides reach outside the memory behind the tensor.
    #[error("{tensor}: layout reaches bytes {first}..{end}, but its memory has 0..{available}")]
    OutOfBounds {
        /// The tensor.
        tensor: &'static str,
        /// First byte reached.
        first: i64,
        /// One past the last byte reached.
        end: i64,
        /// Bytes there are.
        available: usize,
    },
    /// The address is not a multiple of the element size.
    #[error("{tensor}: address must be a multiple of {expected} bytes, got remainder {got}")]
    Misaligned {
        /// The tensor.
        tensor: &'static str,
        /// Element size.
        expected: usize,
        /// Address modulo element size.
        got: usize,
    },
    /// A tensor must be row-major without gaps here.
    #[error("{tensor}: expected a row-major tensor without gaps, got strides {strides:?}; copy it with relayout")]
    NotContiguous {
        /// The tensor.
        tensor: &'static str,
        /// Its strides in elements.
        strides: Vec<i64>,
    },
    /// Two elements of an output are the same memory (for example a stride of 0).
    #[error("{tensor}: an output's elements must not overlap; expected distinct addresses, got strides {strides:?}")]
    SelfOverlap {
        /// The tensor.
        tensor: &'static str,
        /// Its strides in elements.
        strides: Vec<i64>,
    },
    /// An output shares memory with another operand.
    #[error("{output} overlaps {other}; an output needs memory of its own")]
    Overlap {
        /// The output.
        output: &'static str,
        /// The other operand.
        other: &'static str,
    },
    /// A parameter is NaN, infinite, or too large for f32.
    #[error("{parameter}: expected a number of magnitude at most {limit:e}, got {got:e}")]
    OutOfRange {
        /// The parameter.
        parameter: &'static str,
        /// The largest magnitude.
        limit: f64,
        /// Its value.
        got: f64,
    },
    /// A parameter has a value that it cannot have.
    #[error("{parameter}: expected {expected}, got {got}")]
    Parameter {
        /// The parameter.
        parameter: &'static str,
        /// What would do.
        expected: String,
        /// Its value.
        got: String,
    },
    /// Query heads cannot be shared out evenly over key/value heads.
    #[error("k: kv_heads must divide heads = {heads}, got {kv_heads}")]
    HeadGroups {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// Something exceeds a limit of the contract.
    #[error("{what}: at most {limit} supported, got {got}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// A list has the wrong number of entries.
    #[error("{list}: expected {expected} entries, got {got}")]
    Length {
        /// The list.
        list: &'static str,
        /// Entries the problem asks for.
        expected: String,
        /// Entries given.
        got: usize,
    },
    /// An entry of a list is out of range.
    #[error("{list}[{index}]: expected {expected}, got {got}")]
    Value {
        /// The list.
        list: &'static str,
        /// Position of the entry.
        index: usize,
        /// What would do.
        expected: String,
        /// The entry.
        got: String,
    },
    /// An operand the plan needs was not given.
    #[error("{tensor}: expected a tensor, got none; {reason}")]
    Missing {
        /// The tensor.
        tensor: &'static str,
        /// Why it is needed.
        reason: &'static str,
    },
    /// An operand was given, or a gradient asked for, that the problem does not have.
    #[error("{tensor}: expected none, got one; {reason}")]
    Unexpected {
        /// The tensor.
        tensor: &'static str,
        /// Why it has no place.
        reason: &'static str,
    },
    /// A tensor lives on another device than the plan.
    #[error("{tensor}: expected a tensor on {expected}, got one on {got}")]
    WrongDevice {
        /// The tensor.
        tensor: &'static str,
        /// The plan's device.
        expected: DeviceId,
        /// The tensor's device.
        got: DeviceId,
    },
}

/// A device's failure.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device cannot do this; the limit is named.
    #[error("unsupported: {limit}")]
    Unsupported {
        /// The limit and what to do about it.
        limit: String,
    },
    /// Memory ran out.
    #[error("out of memory: {}; use smaller sizes or `tilefold plan` to find what fits", shortage(*asked, *free))]
    OutOfMemory {
        /// Bytes asked for, 0 when it cannot be told.
        asked: u64,
        /// Bytes free, 0 when it cannot be told.
        free: u64,
    },
    /// The device went away.
    #[error("device lost: {message}")]
    Lost {
        /// What the driver said.
        message: String,
    },
    /// A driver call failed.
    #[error("{call} failed with status {status}: {message}")]
    Driver {
        /// The call.
        call: &'static str,
        /// Its status code.
        status: i64,
        /// The driver's words.
        message: String,
    },
    /// A plan, stream or tensor of another device was used.
    #[error("{what} belongs to {got}, not to {expected}")]
    WrongDevice {
        /// What was used.
        what: &'static str,
        /// This device.
        expected: DeviceId,
        /// The device it belongs to.
        got: DeviceId,
    },
}

/// What is known of memory that ran out.
fn shortage(asked: u64, free: u64) -> String {
    match (asked, free) {
        (0, _) => "the driver does not tell how much it asked for".to_owned(),
        (asked, 0) => format!("asked for {asked} bytes, and the driver does not tell how many are free"),
        (asked, free) => format!("asked for {asked} bytes, {free} free"),
    }
}

/// The result of a device call.
pub type DeviceResult<T> = Result<T, DeviceError>;

/// Why a device cannot be opened.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This version of the crate has no such backend.
    #[error("tilefold {version} has no backend for {kind} devices yet; the CPU does everything")]
    NoBackend {
        /// The kind of device.
        kind: &'static str,
        /// The crate's version.
        version: &'static str,
    },
    /// A driver library is missing.
    #[error("cannot load {library}; {hint}")]
    NoDriver {
        /// The library.
        library: String,
        /// What to install.
        hint: String,
    },
    /// This build leaves the backend out.
    #[error("this build has no backend for {kind} devices; build it with the cargo feature `{kind}`")]
    NotCompiled {
        /// The kind of device, which is also the feature.
        kind: &'static str,
    },
    /// A driver or compiler is there, but too old.
    #[error("{what} is {found}, and {needed} or newer is needed; {hint}")]
    TooOld {
        /// The library.
        what: String,
        /// Its version.
        found: String,
        /// The oldest version that will do.
        needed: String,
        /// What to install.
        hint: String,
    },
    /// No device has this name.
    #[error("no device `{name}`; known: {known}")]
    NoSuchDevice {
        /// The name asked for.
        name: String,
        /// Names that exist.
        known: String,
    },
    /// An environment variable or option has a value that cannot be used.
    #[error("{variable}={value}: expected {expected}")]
    BadSetting {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// Values that would do.
        expected: String,
    },
    /// The device was found but failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_ran_out_is_told_as_far_as_it_is_known() {
        let text = |asked, free| DeviceError::OutOfMemory { asked, free }.to_string();
        assert!(text(7, 5).starts_with("out of memory: asked for 7 bytes, 5 free; use smaller sizes"));
        for (asked, free, has_asked) in [(7, 0, true), (0, 0, false)] {
            let text = text(asked, free);
            assert!(text.contains("does not tell") && text.contains('7') == has_asked && !text.contains('0'), "{text}");
        }
    }
}
