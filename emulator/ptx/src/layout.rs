//! Places of variables: parameters, constants, shared memory with guard zones, local memory, address windows.

use std::collections::HashMap;

use crate::syntax::{Entry, Operand, StateSpace, Variable};

/// First address of every space but the global one, so that small and negative offsets are seen to be wrong.
pub(crate) const START: u64 = 1024;
/// Unmapped bytes after every static shared variable.
const SHARED_GUARD: u64 = 64;
/// Windows of the generic address space; global memory starts above them.
pub(crate) const SHARED_WINDOW: u64 = 1 << 32;
pub(crate) const LOCAL_WINDOW: u64 = 2 << 32;
pub(crate) const CONSTANT_WINDOW: u64 = 3 << 32;
pub(crate) const PARAMETER_WINDOW: u64 = 4 << 32;
pub(crate) const WINDOWS_END: u64 = 5 << 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Fixed {
        space: StateSpace,
        address: u64,
    },
    /// A module variable in global memory, by its index in `Module::variables`.
    Global {
        variable: usize,
    },
}

#[derive(Debug, Default)]
pub(crate) struct Symbols {
    places: HashMap<String, Place>,
}

impl Symbols {
    pub(crate) fn find(&self, name: &str) -> Option<Place> {
        self.places.get(name).copied()
    }
}

/// Where the variables of one kernel lie.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub(crate) symbols: Symbols,
    /// (offset, bytes, align) of every parameter.
    pub(crate) parameters: Vec<(u32, u32, u32)>,
    pub(crate) parameter_bytes: u64,
    /// Start and length of the static shared variables.
    pub(crate) shared_ranges: Vec<(u64, u64)>,
    /// Where dynamic shared memory starts.
    pub(crate) dynamic_shared: u64,
    /// Bytes of static shared memory that hardware would need (no guard zones).
    pub(crate) static_shared_bytes: u64,
    pub(crate) local_bytes: u64,
}

fn align_up(value: u64, align: u32) -> u64 {
    value.next_multiple_of(u64::from(align.max(1)))
}

/// The image of the constant bank and the places of its variables.
pub(crate) fn constant_bank(variables: &[Variable]) -> (Vec<u8>, HashMap<String, u64>) {
    let mut bank = Vec::new();
    let mut places = HashMap::new();
    for variable in variables.iter().filter(|v| v.space == StateSpace::Constant) {
        let at = align_up(bank.len() as u64, variable.align);
        places.insert(variable.name.clone(), START + at);
        bank.resize(usize::try_from(at).unwrap_or(usize::MAX), 0);
        bank.extend_from_slice(&variable.initial);
        bank.resize(usize::try_from(at.saturating_add(variable.bytes)).unwrap_or(usize::MAX), 0);
    }
    (bank, places)
}

pub(crate) fn layout(entry: &Entry, variables: &[Variable], constants: &HashMap<String, u64>) -> Layout {
    let mut layout = Layout::default();
    for (name, &address) in constants {
        layout.fix(name, StateSpace::Constant, address);
    }
    for (at, variable) in variables.iter().enumerate().filter(|(_, v)| v.space == StateSpace::Global) {
        layout.symbols.places.insert(variable.name.clone(), Place::Global { variable: at });
    }
    layout.place_shared(entry, variables);
    layout.place_local(entry);
    layout.place_parameters(entry);
    layout
}

impl Layout {
    fn fix(&mut self, name: &str, space: StateSpace, address: u64) {
        self.symbols.places.insert(name.to_owned(), Place::Fixed { space, address });
    }

    fn place_shared(&mut self, entry: &Entry, variables: &[Variable]) {
        let mut at = START;
        let mut dynamic_align = 16;
        let of_module = variables.iter().filter(|v| v.space == StateSpace::Shared && uses(entry, &v.name));
        let of_body = entry.body.variables.iter().filter(|v| v.space == StateSpace::Shared);
        let all: Vec<&Variable> = of_module.chain(of_body).collect();
        for variable in all.iter().filter(|v| !v.dynamic) {
            at = align_up(at, variable.align);
            self.static_shared_bytes = align_up(self.static_shared_bytes, variable.align) + variable.bytes;
            self.shared_ranges.push((at, variable.bytes));
            self.fix(&variable.name, StateSpace::Shared, at);
            at += variable.bytes + SHARED_GUARD;
        }
        let dynamic: Vec<&&Variable> = all.iter().filter(|v| v.dynamic).collect();
        for variable in &dynamic {
            dynamic_align = dynamic_align.max(variable.align);
        }
        self.dynamic_shared = align_up(at, dynamic_align);
        for variable in dynamic {
            self.fix(&variable.name, StateSpace::Shared, self.dynamic_shared);
        }
    }

    fn place_local(&mut self, entry: &Entry) {
        for variable in entry.body.variables.iter().filter(|v| v.space == StateSpace::Local) {
            let at = align_up(self.local_bytes, variable.align);
            self.fix(&variable.name, StateSpace::Local, START + at);
            self.local_bytes = at + variable.bytes;
        }
    }

    fn place_parameters(&mut self, entry: &Entry) {
        for parameter in &entry.parameters {
            let at = align_up(self.parameter_bytes, parameter.align);
            self.fix(&parameter.name, StateSpace::Parameter, START + at);
            self.parameter_bytes = at + parameter.bytes;
            let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
            self.parameters.push((narrow(at), narrow(parameter.bytes), parameter.align));
        }
    }
}

fn uses(entry: &Entry, name: &str) -> bool {
    fn names(operand: &Operand, name: &str) -> bool {
        match operand {
            Operand::Symbol(found, _) => found == name,
            Operand::Address(crate::syntax::Base::Symbol(found), _) => found == name,
            Operand::Vector(parts) => parts.iter().any(|part| names(part, name)),
            _ => false,
        }
    }
    entry.body.statements.iter().any(|s| s.operands.iter().any(|operand| names(operand, name)))
}
