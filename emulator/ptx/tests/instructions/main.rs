//! Instructions against values worked out by hand from the PTX manual, and every kind of fault.

mod conversions;
mod faults;
mod floats;
mod harness;
mod integers;
mod launches;
mod matrices;
mod memories;
mod refusals;
mod warps;
