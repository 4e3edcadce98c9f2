//! Decoded instructions: register indices resolved, immediates and special registers turned into registers.

/// Index into one of the register files.
pub(crate) type Index = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(crate) predicate: Index,
    pub(crate) negated: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) op: Op,
    pub(crate) guard: Option<Guard>,
    /// Registers read and written, as positions in `Code::slots`: which values are defined is followed through them.
    pub(crate) sources: (u32, u32),
    pub(crate) results: (u32, u32),
    /// An undefined source is a fault here; elsewhere it only makes the result undefined.
    pub(crate) strict: bool,
    /// Index of the statement in the body, for line and text.
    pub(crate) statement: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IntegerType {
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatType {
    F16,
    Bf16,
    F16x2,
    Bf16x2,
    F32,
    F64,
}

/// Types of `setp` and `cvt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IntegerOp {
    Add,
    AddSaturating,
    Sub,
    SubSaturating,
    MulLow,
    MulHigh,
    MadLow,
    MadHigh,
    Sad,
    Div,
    Rem,
    Min,
    Max,
    Abs,
    Neg,
    And,
    Or,
    Xor,
    Not,
    LogicalNot,
    ShiftLeft,
    ShiftRight,
    ExtractField,
    InsertField,
    Reverse,
}

/// Counting instructions, whose result is 32 bits wide whatever the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CountOp {
    Population,
    LeadingZeros,
    FindLeading,
    FindLeadingShift,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatOp {
    Add,
    Sub,
    Mul,
    Fma,
    FmaRelu,
    Div,
    Min,
    Max,
    MinNan,
    MaxNan,
    Abs,
    Neg,
    CopySign,
    Reciprocal,
    Sqrt,
    ReciprocalSqrt,
    Exp2,
    Log2,
    Sin,
    Cos,
    Tanh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
    /// Halves away from zero (`cvt.rna.tf32`).
    Away,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FloatMode {
    pub(crate) rounding: Rounding,
    pub(crate) ftz: bool,
    pub(crate) saturate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    /// Unordered forms: true when either side is NaN.
    EqualU,
    NotEqualU,
    LessU,
    LessEqualU,
    GreaterU,
    GreaterEqualU,
    Ordered,
    Unordered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

/// The predicate that a `setp` is combined with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Combine {
    pub(crate) logic: Logic,
    pub(crate) predicate: Index,
    pub(crate) negated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Parameter,
    Constant,
    Global,
    Shared,
    Local,
    Generic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddressBase {
    None,
    Word(Index),
    Double(Index),
}

/// `[base + offset]`; symbols without a fixed place become a `Double` base that the launch fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) space: Space,
    pub(crate) base: AddressBase,
    pub(crate) offset: i64,
}

/// Up to four elements that one access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Elements {
    /// Bytes of one element.
    pub(crate) width: u32,
    pub(crate) count: u32,
    pub(crate) registers: [Index; 4],
    /// The registers are 64 bits wide.
    pub(crate) double: bool,
    /// The registers are 16 bits wide: results are cut to them.
    pub(crate) half: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    CompareExchange,
    Increment,
    Decrement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReduceOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierReduce {
    Population,
    And,
    Or,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierKind {
    Sync,
    Arrive,
    /// Predicate source, whether it is negated, and the result (a word for the count, else a predicate).
    Reduce {
        op: BarrierReduce,
        predicate: Index,
        negated: bool,
        d: Index,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Barrier {
    pub(crate) kind: BarrierKind,
    pub(crate) id: Index,
    pub(crate) threads: Option<Index>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixType {
    F16,
    Bf16,
    Tf32,
}

/// `mma.sync` with 16 rows, 8 columns and `depth` products a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mma {
    pub(crate) depth: u32,
    pub(crate) input: MatrixType,
    pub(crate) d: [Index; 4],
    pub(crate) a: [Index; 4],
    pub(crate) b: [Index; 2],
    pub(crate) c: [Index; 4],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Move32 {
        d: Index,
        a: Index,
    },
    Move64 {
        d: Index,
        a: Index,
    },
    MovePredicate {
        d: Index,
        a: Index,
    },
    /// Parts of `bits` bits, lowest first, into one wider register.
    Pack {
        d: Index,
        double: bool,
        bits: u32,
        parts: Vec<Index>,
    },
    Unpack {
        a: Index,
        double: bool,
        bits: u32,
        parts: Vec<Index>,
    },
    Integer {
        op: IntegerOp,
        ty: IntegerType,
        d: Index,
        s: [Index; 4],
    },
    /// `mul.wide`, or `mad.wide` with `c`.
    Wide {
        ty: IntegerType,
        d: Index,
        a: Index,
        b: Index,
        c: Option<Index>,
    },
    Count {
        op: CountOp,
        ty: IntegerType,
        d: Index,
        a: Index,
    },
    Lop3 {
        table: u8,
        d: Index,
        s: [Index; 3],
    },
    Permute {
        d: Index,
        s: [Index; 3],
    },
    FunnelShift {
        left: bool,
        wrap: bool,
        d: Index,
        s: [Index; 3],
    },
    SetPredicate {
        compare: Compare,
        ty: Type,
        ftz: bool,
        combine: Option<Combine>,
        p: Index,
        q: Option<Index>,
        a: Index,
        b: Index,
    },
    Select {
        double: bool,
        d: Index,
        a: Index,
        b: Index,
        p: Index,
    },
    /// `slct`: `a` where `c` is at least zero.
    SelectSign {
        double: bool,
        float: bool,
        ftz: bool,
        d: Index,
        a: Index,
        b: Index,
        c: Index,
    },
    Predicate {
        logic: Logic,
        d: Index,
        a: Index,
        b: Index,
    },
    NotPredicate {
        d: Index,
        a: Index,
    },
    Float {
        op: FloatOp,
        ty: FloatType,
        mode: FloatMode,
        d: Index,
        s: [Index; 3],
    },
    /// `integral`: rounded to an integer, also where the result is a float (`.rni` and its like).
    Convert {
        to: Type,
        from: Type,
        mode: FloatMode,
        integral: bool,
        d: Index,
        a: Index,
        double_source: bool,
        double_result: bool,
    },
    /// Two f32 into one packed register, `a` in the upper half.
    ConvertPair {
        bf16: bool,
        rounding: Rounding,
        relu: bool,
        d: Index,
        a: Index,
        b: Index,
    },
    ConvertTf32 {
        rounding: Rounding,
        d: Index,
        a: Index,
    },
    /// Between generic addresses and those of a space; `to` is `cvta.to`.
    ToSpace {
        space: Space,
        to: bool,
        d: Index,
        a: Index,
    },
    Load {
        address: Address,
        signed: bool,
        strong: bool,
        elements: Elements,
    },
    Store {
        address: Address,
        strong: bool,
        elements: Elements,
    },
    Atomic {
        address: Address,
        op: AtomicOp,
        ty: IntegerType,
        d: Option<Index>,
        b: Index,
        c: Index,
    },
    CopyAsync {
        to: Address,
        from: Address,
        bytes: u32,
        source_bytes: Option<Index>,
    },
    CommitGroup,
    WaitGroup {
        pending: u32,
    },
    WaitAll,
    LoadMatrix {
        address: Address,
        count: u32,
        transposed: bool,
        d: [Index; 4],
    },
    Mma(Mma),
    Shuffle {
        mode: ShuffleMode,
        d: Index,
        p: Option<Index>,
        s: [Index; 4],
    },
    Vote {
        mode: VoteMode,
        d: Index,
        a: Index,
        negated: bool,
        members: Index,
    },
    Match {
        all: bool,
        double: bool,
        d: Index,
        p: Option<Index>,
        a: Index,
        members: Index,
    },
    Reduce {
        op: ReduceOp,
        signed: bool,
        d: Index,
        a: Index,
        members: Index,
    },
    ActiveMask {
        d: Index,
    },
    Clock {
        d: Index,
        double: bool,
    },
    Barrier(Barrier),
    WarpBarrier {
        members: Index,
    },
    Branch {
        target: u32,
    },
    BranchTable {
        index: Index,
        targets: Vec<u32>,
    },
    Exit,
    Trap,
    /// Fences and hints: execution here is in order, so that nothing is left to do.
    Nothing,
}
