//! Instructions against values worked out by hand from the PTX manual, and every kind of fault.

mod conversions;
mod floats;
mod harness;
mod integers;
mod launches;
mod matrices;
mod warps;
