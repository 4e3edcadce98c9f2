//! A parsed module: its kernels with their sizes, its variables.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ParseError;
use crate::decode::{Code, decode};
use crate::layout::{constant_bank, layout};
use crate::parse::parse;
use crate::syntax::{Entry, StateSpace, Variable};

/// Bytes of the constant bank.
const CONSTANT_BYTES: u64 = 64 << 10;
/// Bytes of local memory of a thread.
const LOCAL_BYTES: u64 = 512 << 10;
/// Static shared memory that a kernel may declare.
const STATIC_SHARED_BYTES: u64 = 48 << 10;
/// Bytes of parameters.
const PARAMETER_BYTES: u64 = 32_764;

/// A PTX text that was understood whole.
#[derive(Debug)]
pub struct Module {
    /// Tells modules apart where memory keeps their variables.
    pub(crate) id: u64,
    pub(crate) variables: Vec<Variable>,
    pub(crate) constants: Vec<u8>,
    kernels: Vec<Kernel>,
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Place in the block of parameters.
    pub offset: u32,
    /// Size.
    pub bytes: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// An entry of a module.
#[derive(Debug)]
pub struct Kernel {
    /// The name in the PTX text.
    pub name: String,
    /// The parameters in order.
    pub parameters: Vec<Parameter>,
    /// Bytes of the block of parameters.
    pub parameter_bytes: u32,
    /// Shared memory that the kernel declares itself.
    pub static_shared_bytes: u32,
    /// Local memory of a thread.
    pub local_bytes: u32,
    /// Threads of a block that the kernel was compiled for, where it says so.
    pub max_threads: Option<u32>,
    pub(crate) code: Arc<Code>,
    pub(crate) shared_ranges: Vec<(u64, u64)>,
    pub(crate) dynamic_shared: u64,
}

impl Module {
    /// Reads a PTX text.
    ///
    /// # Errors
    /// [`ParseError`] names the line of what is not understood; nothing unknown is passed over.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let text = parse(ptx)?;
        let wanted: u64 = sum(text.variables.iter().filter(|v| v.space == StateSpace::Constant));
        if wanted > CONSTANT_BYTES {
            return Err(ParseError::Unsupported { line: 1, what: format!("a constant bank of {wanted} bytes") });
        }
        let (constants, places) = constant_bank(&text.variables);
        let mut kernels = Vec::with_capacity(text.entries.len());
        for entry in &text.entries {
            check_sizes(entry)?;
            let layout = layout(entry, &text.variables, &places);
            let code = decode(&entry.body, &layout.symbols, text.target)?;
            let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
            if layout.static_shared_bytes > STATIC_SHARED_BYTES {
                let what = format!("{} bytes of static shared memory", layout.static_shared_bytes);
                return Err(ParseError::Unsupported { line: entry.line, what });
            }
            let parameters = layout.parameters.iter().map(|&(offset, bytes, align)| Parameter { offset, bytes, align });
            kernels.push(Kernel {
                name: entry.name.clone(),
                parameters: parameters.collect(),
                parameter_bytes: narrow(layout.parameter_bytes),
                static_shared_bytes: narrow(layout.static_shared_bytes),
                local_bytes: narrow(layout.local_bytes),
                max_threads: entry.max_threads,
                code: Arc::new(code),
                shared_ranges: layout.shared_ranges,
                dynamic_shared: layout.dynamic_shared,
            });
        }
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, variables: text.variables, constants, kernels })
    }

    /// All kernels, in the order of the text.
    #[must_use]
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel of that name.
    #[must_use]
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|kernel| kernel.name == name)
    }
}

fn sum<'v>(variables: impl Iterator<Item = &'v Variable>) -> u64 {
    variables.fold(0, |total, v| total.saturating_add(v.bytes.saturating_add(u64::from(v.align))))
}

fn check_sizes(entry: &Entry) -> Result<(), ParseError> {
    let refuse = |what: String| Err(ParseError::Unsupported { line: entry.line, what });
    let of = |space| sum(entry.body.variables.iter().filter(move |v| v.space == space));
    let local = of(StateSpace::Local);
    if local > LOCAL_BYTES {
        return refuse(format!("{local} bytes of local memory"));
    }
    let parameters = sum(entry.parameters.iter());
    if parameters > PARAMETER_BYTES {
        return refuse(format!("{parameters} bytes of parameters"));
    }
    Ok(())
}
