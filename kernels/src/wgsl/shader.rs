//! One WGSL text: constants, the argument, an accessor for each operand, and the kernel's file.

use std::fmt::Write;

use tilefold_core::DType;

/// Files that kernels are made of, by the names they are given here.
const AXES: &str = include_str!("../../include/axes.wgsl");
const NUMBERS: &str = include_str!("../../include/numbers.wgsl");
const ATTENTION: &str = include_str!("../../include/attention.wgsl");
const STEP: &str = include_str!("../../include/step.wgsl");
const BACKWARD: &str = include_str!("../../include/backward.wgsl");

/// A kernel's own file, and what goes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// `attention/forward.wgsl`
    Forward,
    /// `attention/backward_prepare.wgsl`
    Prepare,
    /// `attention/backward_queries.wgsl`
    Queries,
    /// `attention/backward_keys.wgsl`
    Keys,
    /// `attention/sums.wgsl`
    Sums,
    /// `merge.wgsl`
    Merge,
    /// `accumulate.wgsl`
    Accumulate,
    /// `rope.wgsl`
    Rope,
    /// `relayout.wgsl`
    Relayout,
    /// `fill.wgsl`
    Fill,
}

impl File {
    /// Name of the file without its folder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Prepare => "backward_prepare",
            Self::Queries => "backward_queries",
            Self::Keys => "backward_keys",
            Self::Sums => "sums",
            Self::Merge => "merge",
            Self::Accumulate => "accumulate",
            Self::Rope => "rope",
            Self::Relayout => "relayout",
            Self::Fill => "fill",
        }
    }

    fn texts(self) -> &'static [&'static str] {
        match self {
            Self::Forward => &[NUMBERS, ATTENTION, STEP, include_str!("../../attention/forward.wgsl")],
            Self::Prepare => &[NUMBERS, ATTENTION, include_str!("../../attention/backward_prepare.wgsl")],
            Self::Queries => {
                &[NUMBERS, ATTENTION, STEP, BACKWARD, include_str!("../../attention/backward_queries.wgsl")]
            }
            Self::Keys => &[NUMBERS, ATTENTION, STEP, BACKWARD, include_str!("../../attention/backward_keys.wgsl")],
            Self::Sums => &[NUMBERS, include_str!("../../attention/sums.wgsl")],
            Self::Merge => &[NUMBERS, include_str!("../../merge.wgsl")],
            Self::Accumulate => &[NUMBERS, AXES, include_str!("../../accumulate.wgsl")],
            Self::Rope => &[NUMBERS, include_str!("../../rope.wgsl")],
            Self::Relayout => &[NUMBERS, AXES, include_str!("../../relayout.wgsl")],
            Self::Fill => &[include_str!("../../fill.wgsl")],
        }
    }
}

/// A compile-time constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// An unsigned number.
    Number(u32),
    /// A switch.
    Switch(bool),
}

/// How the elements of an operand are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elements {
    /// Numbers of one dtype.
    Numbers(DType),
    /// Words of 32 bits as they are.
    Words,
    /// Elements of so many bytes as they are.
    Bits(u32),
}

/// How an operand is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Use {
    /// The problem has none: what reads it gets 0 and is never reached.
    Absent,
    /// It is read.
    Read(Elements),
    /// It is read four neighbouring channels at a time: they begin at multiples of four elements.
    ReadQuads(DType),
    /// It is written, and what was written can be read.
    Write(Elements),
    /// It is written four neighbouring channels at a time.
    WriteQuads(DType),
}

/// How the threads of a workgroup read a row that all of them want.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Each for itself.
    Nothing,
    /// So many neighbours, a power of two, read some channels each and get the others from each other's registers.
    Subgroup(u32),
    /// So many rows at a time are read together into the workgroup's memory.
    Workgroup(u32),
}

/// One operand of a kernel as its text knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OperandKey {
    /// Its name in the text.
    pub name: &'static str,
    /// How it is used.
    pub usage: Use,
    /// Number of the binding it is in; operands may share one.
    pub slot: u32,
    /// Channels of a row, where it is read or written in quads; 0 elsewhere.
    pub channels: u32,
    /// How threads share a row that all of them want.
    pub sharing: Sharing,
}

/// A kernel specialised: equal values are equal texts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shader {
    /// The kernel.
    pub file: File,
    /// Constants in the order of the text.
    pub constants: Vec<(&'static str, Constant)>,
    /// Fields of the argument before the places of the operands, with their types.
    pub scalars: &'static [(&'static str, &'static str)],
    /// Operands in the order of the argument.
    pub operands: Vec<OperandKey>,
}

impl Shader {
    /// The text. Bindings whose bit is set in `written` lie in a buffer that the dispatch writes through another one,
    /// and must be declared so.
    #[must_use]
    pub fn source(&self, written: u32) -> String {
        let mut text = String::new();
        self.write(written, &mut text).unwrap_or_default(); // Writing to a string does not fail.
        self.file.texts().iter().for_each(|part| unroll(part, &self.constants, &mut text));
        text.push_str(if self.has_subgroups() { ENTRY_WITH_SUBGROUPS } else { ENTRY });
        text
    }

    /// Whether threads read each other's registers: the device must have the feature `subgroups`.
    #[must_use]
    pub fn has_subgroups(&self) -> bool {
        self.operands.iter().any(|operand| matches!(operand.sharing, Sharing::Subgroup(_)))
    }

    fn write(&self, written: u32, text: &mut String) -> std::fmt::Result {
        for &(name, constant) in &self.constants {
            match constant {
                Constant::Number(number) => writeln!(text, "const {name}: u32 = {number}u;")?,
                Constant::Switch(switch) => writeln!(text, "const {name}: bool = {switch};")?,
            }
        }
        if !self.operands.is_empty() {
            writeln!(text, "struct Place {{")?;
            for field in PLACE {
                writeln!(text, "    {field}: u32,")?;
            }
            writeln!(text, "}}")?;
        }
        writeln!(text, "struct Params {{")?;
        for (name, kind) in self.scalars {
            writeln!(text, "    {name}: {kind},")?;
        }
        // Arrays of vectors fill whole lines of four words.
        let words = self.scalars.iter().filter(|(_, kind)| !kind.starts_with("array")).count();
        for unused in words..words.next_multiple_of(4) {
            writeln!(text, "    unused{unused}: u32,")?;
        }
        for operand in &self.operands {
            writeln!(text, "    {}: Place,", operand.name)?;
        }
        writeln!(text, "}}\n@group(0) @binding(0) var<uniform> params: Params;")?;
        if self.has_subgroups() {
            writeln!(text, "var<private> lane: u32;")?;
        }
        let mut declared = 0_u32;
        for operand in &self.operands {
            let bit = 1 << operand.slot;
            if operand.usage != Use::Absent && declared & bit == 0 {
                declared |= bit;
                operand.declare(written & bit != 0, text)?;
            }
            operand.accessors(text)?;
        }
        Ok(())
    }
}

/// The entry point: `run` of the kernel's file.
const ENTRY: &str = "
@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    run(group, thread);
}
";

/// The same where threads read each other's registers: each must know its number in its subgroup.
const ENTRY_WITH_SUBGROUPS: &str = "
@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) own_lane: u32,
) {
    lane = own_lane;
    run(group, thread);
}
";

/// Quads of channels of a row that lies in registers, and those of a slice of a wider one. Compilers' time goes with them.
const NARROW_QUADS: u32 = 16;
const SLICE_QUADS: u32 = 8;

/// How rows of so many channels are taken: slices, and quads of each. The last slice may end beyond the row, where reads give
/// 0 and writes do nothing.
pub(crate) fn slices(channels: u32) -> [u32; 2] {
    let quads = channels.div_ceil(4);
    let slices = if quads <= NARROW_QUADS { 1 } else { quads.div_ceil(SLICE_QUADS) };
    [slices, quads.div_ceil(slices)]
}

/// Appends a file with its loops over quads of channels written out: `for (var c = 0u; c < V_SLICE; c++) {` becomes its body
/// for each `c`, in which `quad_x(row, c)` is `quad_x_0(row)`.
///
/// Compilers unroll short loops alone, and an array that is read by a running index does not lie in registers. So a loop
/// over the slices of a row is none where there is one, and then that over all quads of a row, `V_QUADS`, is written out too.
/// Where there are several, both loops stay, to an end that no compiler knows, since it would write them out: `nothing` is
/// the kernel's name for a 0 of which only the device knows.
fn unroll(file: &str, constants: &[(&'static str, Constant)], text: &mut String) {
    let number = |wanted: &str| match constants.iter().find(|(constant, _)| *constant == wanted) {
        Some(&(_, Constant::Number(number))) => Some(number),
        _ => None,
    };
    let mut lines = file.lines();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let loop_to = |index: &str| {
            let rest = line.trim_start().strip_prefix(&format!("for (var {index} = 0u; {index} < "))?;
            rest.strip_suffix(&format!("; {index}++) {{"))
        };
        if let Some((name, slices)) = loop_to("slice").and_then(|name| Some((name, number(name)?))) {
            let slice = match slices {
                1 => format!("{{\n{indent}    const slice = 0u;"),
                _ => format!("for (var slice = 0u; slice < {name} + nothing; slice++) {{"),
            };
            text.extend([indent, &slice, "\n"]);
            continue;
        }
        let Some((name, count)) = loop_to("c").and_then(|name| Some((name, number(name)?))) else {
            text.extend([line, "\n"]);
            continue;
        };
        if name.strip_suffix("_QUADS").and_then(|row| number(&format!("{row}_SLICES"))) > Some(1) {
            text.extend([indent, "for (var c = 0u; c < ", name, " + nothing; c++) {\n"]);
            continue;
        }
        let end = format!("{indent}}}");
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != end).collect();
        for c in 0..count {
            text.extend([indent, "{\n"]);
            for line in &body {
                text.extend([&with_index(line, c), "\n"]);
            }
            text.extend([&*end, "\n"]);
        }
    }
}

/// A line with `c` replaced by its value.
fn with_index(line: &str, c: u32) -> String {
    let mut line = line.to_owned();
    if let (Some(call), Some(index)) = (line.find("quad_"), line.find(", c)")) {
        let open = line[call..index].find('(').map_or(index, |open| call + open);
        line = format!("{}_{c}{}{}", &line[..open], &line[open..index], &line[index + ", c".len()..]);
    }
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let mut result = String::new();
    let mut before = ' ';
    for (at, letter) in line.char_indices() {
        let after = line[at + letter.len_utf8()..].chars().next().unwrap_or(' ');
        if letter == 'c' && !is_word(before) && before != '.' && !is_word(after) {
            result.push_str(&format!("{c}u"));
        } else {
            result.push(letter);
        }
        before = letter;
    }
    result
}

/// Fields of an operand's place: where its element with all indices 0 lies in the binding, and strides, in elements.
const PLACE: [&str; 8] = ["base", "batch", "row", "head", "position", "last", "unused0", "unused1"];

impl OperandKey {
    /// The binding.
    fn declare(&self, written: bool, text: &mut String) -> std::fmt::Result {
        let kind = match self.usage {
            Use::ReadQuads(DType::F32) | Use::WriteQuads(DType::F32) => "vec4<u32>",
            Use::ReadQuads(_) | Use::WriteQuads(_) => "vec2<u32>",
            Use::Write(Elements::Numbers(dtype)) if dtype.size_bytes() < 4 => "atomic<u32>",
            Use::Write(Elements::Bits(bytes)) if bytes < 4 => "atomic<u32>",
            _ => "u32",
        };
        let access =
            if written || matches!(self.usage, Use::Write(_) | Use::WriteQuads(_)) { "read_write" } else { "read" };
        let (slot, binding) = (self.slot, self.slot + 1);
        writeln!(text, "@group(0) @binding({binding}) var<storage, {access}> words{slot}: array<{kind}>;")
    }

    fn accessors(&self, text: &mut String) -> std::fmt::Result {
        let Self { name, slot, .. } = *self;
        let words = format!("words{slot}");
        match self.usage {
            Use::Absent => {
                let result = match name {
                    "key_mask" => "bool",
                    "q_segments" | "k_segments" => "i32",
                    "kv_lengths" | "slopes" => "u32",
                    _ => "f32",
                };
                writeln!(text, "fn load_{name}(at: u32) -> {result} {{ return {result}(); }}")?;
                writeln!(text, "fn store_{name}(at: u32, x: f32) {{}}")?;
                writeln!(text, "fn load4_{name}(at: u32, quad: u32) -> vec4<f32> {{ return vec4<f32>(); }}")?;
                writeln!(text, "fn store4_{name}(at: u32, quad: u32, x: vec4<f32>) {{}}")
            }
            Use::Read(elements) => {
                self.load(elements, &words, text)?;
                self.load4(text)?;
                self.row(text)
            }
            Use::ReadQuads(dtype) => {
                let body = match dtype {
                    DType::F32 => format!("return bitcast<vec4<f32>>({words}[(at >> 2u) + quad]);"),
                    _ => {
                        let from = from(dtype);
                        format!(
                            "let w = {words}[(at >> 2u) + quad]; \
return vec4<f32>({from}(w.x), {from}(w.x >> 16u), {from}(w.y), {from}(w.y >> 16u));"
                        )
                    }
                };
                let body = if dtype == DType::BF16 { body.replace("from_bf16(w.x >> 16u)", HIGH_X) } else { body };
                let body = if dtype == DType::BF16 { body.replace("from_bf16(w.y >> 16u)", HIGH_Y) } else { body };
                let before = self.unless_beyond("return vec4<f32>();");
                writeln!(text, "fn load4_{name}(at: u32, quad: u32) -> vec4<f32> {{ {before}{body} }}")?;
                self.row(text)
            }
            Use::WriteQuads(dtype) => {
                let bits = match dtype {
                    DType::F32 => "bitcast<vec4<u32>>(x)".to_owned(),
                    _ => {
                        let to = to(dtype);
                        format!("vec2<u32>({to}(x.x) | ({to}(x.y) << 16u), {to}(x.z) | ({to}(x.w) << 16u))")
                    }
                };
                let body = format!("{}{words}[(at >> 2u) + quad] = {bits};", self.unless_beyond("return;"));
                writeln!(text, "fn store4_{name}(at: u32, quad: u32, x: vec4<f32>) {{ {body} }}")?;
                match dtype {
                    DType::F32 => {
                        let body = format!("return bitcast<vec4<f32>>({words}[(at >> 2u) + quad]);");
                        writeln!(text, "fn load4_{name}(at: u32, quad: u32) -> vec4<f32> {{ {body} }}")
                    }
                    _ => Ok(()),
                }
            }
            Use::Write(elements) => {
                self.store(elements, &words, text)?;
                self.store4(elements, &words, text)?;
                match elements {
                    Elements::Numbers(dtype) if dtype.size_bytes() == 2 => {
                        let (name, from) = (self.name, from(dtype));
                        let word = format!("atomicLoad(&{words}[at >> 1u]) >> ((at & 1u) * 16u)");
                        writeln!(text, "fn load_{name}(at: u32) -> f32 {{ return {from}({word}); }}")
                    }
                    Elements::Bits(_) => Ok(()),
                    _ => self.load(elements, &words, text),
                }
            }
        }
    }

    fn load(&self, elements: Elements, words: &str, text: &mut String) -> std::fmt::Result {
        let name = self.name;
        let (result, body) = match elements {
            Elements::Words | Elements::Bits(4) => ("u32", format!("{words}[at]")),
            Elements::Bits(2) => ("u32", format!("({words}[at >> 1u] >> ((at & 1u) * 16u)) & 0xffffu")),
            Elements::Bits(_) => ("u32", format!("({words}[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu")),
            Elements::Numbers(DType::F32) => ("f32", format!("bitcast<f32>({words}[at])")),
            Elements::Numbers(DType::I32) => ("i32", format!("bitcast<i32>({words}[at])")),
            Elements::Numbers(DType::Bool) => {
                ("bool", format!("(({words}[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu) != 0u"))
            }
            Elements::Numbers(dtype) => ("f32", format!("{}({words}[at >> 1u] >> ((at & 1u) * 16u))", from(dtype))),
        };
        writeln!(text, "fn load_{name}(at: u32) -> {result} {{ return {body}; }}")
    }

    /// What is done for a quad beyond the row, where slices have such.
    fn unless_beyond(&self, done: &str) -> String {
        let ([slices, quads_of], quads) = (slices(self.channels), self.channels.div_ceil(4));
        if slices * quads_of == quads { String::new() } else { format!("if (quad >= {quads}u) {{ {done} }} ") }
    }

    /// Four channels by their stride.
    fn load4(&self, text: &mut String) -> std::fmt::Result {
        let Self { name, channels, .. } = *self;
        if channels == 0 {
            return Ok(());
        }
        writeln!(text, "fn load4_{name}(at: u32, quad: u32) -> vec4<f32> {{")?;
        writeln!(text, "    let step = params.{name}.last;\n    let start = at + quad * 4u * step;")?;
        let [slices, quads_of] = slices(channels);
        if channels == 4 * slices * quads_of {
            let at = |i: u32| format!("load_{name}(start + {i}u * step)");
            writeln!(text, "    return vec4<f32>({}, {}, {}, {});\n}}", at(0), at(1), at(2), at(3))
        } else {
            writeln!(text, "    var x = vec4<f32>();")?;
            for i in 0..4 {
                writeln!(
                    text,
                    "    if (quad * 4u + {i}u < {channels}u) {{ x[{i}] = load_{name}(start + {i}u * step); }}"
                )?;
            }
            writeln!(text, "    return x;\n}}")
        }
    }

    /// A row that all threads of a workgroup are at: `row_x` begins reading one of its slices, and `quad_x_0`, `quad_x_1`, ...
    /// give its channels.
    fn row(&self, text: &mut String) -> std::fmt::Result {
        let Self { name, channels, .. } = *self;
        if channels == 0 {
            return Ok(());
        }
        let [slices, quads_of] = slices(channels);
        let quads = slices * quads_of;
        if let Sharing::Workgroup(rows) = self.sharing {
            writeln!(text, "var<workgroup> tile_{name}: array<vec4<f32>, {}>;", rows * quads)?;
            writeln!(text, "fn stage_{name}(origin: u32, first: u32, end: u32, thread: u32) {{")?;
            writeln!(text, "    for (var i = thread; i < {}u; i += THREADS) {{", rows * quads)?;
            writeln!(text, "        let row = min(first + i / {quads}u, end - 1u);")?;
            writeln!(
                text,
                "        tile_{name}[i] = load4_{name}(origin + row * params.{name}.position, i % {quads}u);"
            )?;
            writeln!(text, "    }}\n}}\nstruct Row_{name} {{ at: u32 }}")?;
            let body = format!("return Row_{name}(slot * {quads}u + slice * {quads_of}u);");
            writeln!(text, "fn row_{name}(at: u32, slot: u32, slice: u32) -> Row_{name} {{ {body} }}")?;
            return (0..quads_of).try_for_each(|quad| {
                let body = format!("return tile_{name}[row.at + {quad}u];");
                writeln!(text, "fn quad_{name}_{quad}(row: Row_{name}) -> vec4<f32> {{ {body} }}")
            });
        }
        writeln!(text, "fn stage_{name}(origin: u32, first: u32, end: u32, thread: u32) {{}}")?;
        let Sharing::Subgroup(strip) = self.sharing else {
            writeln!(text, "struct Row_{name} {{ at: u32, quad: u32 }}")?;
            let body = format!("return Row_{name}(at, slice * {quads_of}u);");
            writeln!(text, "fn row_{name}(at: u32, slot: u32, slice: u32) -> Row_{name} {{ {body} }}")?;
            return (0..quads_of).try_for_each(|quad| {
                let body = format!("return load4_{name}(row.at, row.quad + {quad}u);");
                writeln!(text, "fn quad_{name}_{quad}(row: Row_{name}) -> vec4<f32> {{ {body} }}")
            });
        };
        // Each lane of a subgroup reads some channels, and the others get them from it.
        let width = channels.min(4 * quads_of);
        let strips = width.div_ceil(strip);
        writeln!(text, "struct Row_{name} {{ strips: array<f32, {strips}> }}")?;
        writeln!(text, "fn row_{name}(at: u32, slot: u32, slice: u32) -> Row_{name} {{\n    var row: Row_{name};")?;
        writeln!(text, "    let own = lane % {strip}u + slice * {width}u;")?;
        for i in 0..strips {
            let channel = format!("{}u + own", i * strip);
            let ends = (slices - 1) * width + (i + 1) * strip > channels;
            let within = if ends { format!("min({channel}, {}u)", channels - 1) } else { channel.clone() };
            let mut load = format!("load_{name}(at + ({within}) * params.{name}.last)");
            if ends && slices * width > channels {
                load = format!("select(0.0, {load}, {channel} < {channels}u)");
            }
            writeln!(text, "    row.strips[{i}] = {load};")?;
        }
        writeln!(text, "    return row;\n}}")?;
        for quad in 0..quads_of {
            let channel = |i: u32| match quad * 4 + i {
                channel if channel < width => {
                    format!("subgroupBroadcast(row.strips[{}], {}u)", channel / strip, channel % strip)
                }
                _ => "0.0".to_owned(),
            };
            let [x, y, z, w] = [0, 1, 2, 3].map(channel);
            writeln!(text, "fn quad_{name}_{quad}(row: Row_{name}) -> vec4<f32> {{")?;
            writeln!(text, "    return vec4<f32>({x}, {y}, {z}, {w});\n}}")?;
        }
        Ok(())
    }

    fn store(&self, elements: Elements, words: &str, text: &mut String) -> std::fmt::Result {
        let name = self.name;
        let body = match elements {
            Elements::Words | Elements::Bits(4) => {
                return writeln!(text, "fn store_{name}(at: u32, x: u32) {{ {words}[at] = x; }}");
            }
            Elements::Bits(bytes) => {
                let (at, within, mask) = if bytes == 2 { (1, 1, 0xffff) } else { (2, 3, 0xff) };
                return writeln!(
                    text,
                    "fn store_{name}(at: u32, x: u32) {{ let shift = (at & {within}u) * {}u; \
atomicAnd(&{words}[at >> {at}u], ~({mask}u << shift)); atomicOr(&{words}[at >> {at}u], x << shift); }}",
                    8 * bytes
                );
            }
            Elements::Numbers(dtype) if dtype.size_bytes() == 4 => format!("{words}[at] = bitcast<u32>(x);"),
            // The word's other half belongs to another thread, or to another tensor.
            Elements::Numbers(dtype) => format!(
                "let shift = (at & 1u) * 16u; atomicAnd(&{words}[at >> 1u], ~(0xffffu << shift)); \
atomicOr(&{words}[at >> 1u], {}(x) << shift);",
                to(dtype)
            ),
        };
        writeln!(text, "fn store_{name}(at: u32, x: f32) {{ {body} }}")
    }

    fn store4(&self, elements: Elements, words: &str, text: &mut String) -> std::fmt::Result {
        let Self { name, channels, .. } = *self;
        let Elements::Numbers(dtype) = elements else { return Ok(()) };
        if channels == 0 {
            return Ok(());
        }
        writeln!(text, "fn store4_{name}(at: u32, quad: u32, x: vec4<f32>) {{")?;
        writeln!(text, "    let step = params.{name}.last;\n    let start = at + quad * 4u * step;")?;
        if dtype.size_bytes() == 2 {
            let to = to(dtype);
            writeln!(text, "    if (step == 1u && (start & 1u) == 0u && quad * 4u + 4u <= {channels}u) {{")?;
            for (word, low, high) in [(0, "x.x", "x.y"), (1, "x.z", "x.w")] {
                writeln!(
                    text,
                    "        atomicStore(&{words}[(start >> 1u) + {word}u], {to}({low}) | ({to}({high}) << 16u));"
                )?;
            }
            writeln!(text, "        return;\n    }}")?;
        }
        for i in 0..4 {
            writeln!(text, "    if (quad * 4u + {i}u < {channels}u) {{ store_{name}(start + {i}u * step, x[{i}]); }}")?;
        }
        writeln!(text, "}}")
    }
}

/// The bfloat16 in a word's high half needs no shift.
const HIGH_X: &str = "bitcast<f32>(w.x & 0xffff0000u)";
const HIGH_Y: &str = "bitcast<f32>(w.y & 0xffff0000u)";

/// The function that reads half a word.
fn from(dtype: DType) -> &'static str {
    if dtype == DType::F16 { "from_f16" } else { "from_bf16" }
}

/// The function that writes half a word.
fn to(dtype: DType) -> &'static str {
    if dtype == DType::F16 { "to_f16" } else { "to_bf16" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_over_channels_are_written_out() {
        let file = "    for (var c = 0u; c < QUADS; c++) {\n        x[r][c] = fma(quad_k(row, c), acc.c, c4);\n    }\n    y();\n";
        let mut text = String::new();
        unroll(file, &[("QUADS", Constant::Number(2))], &mut text);
        let body = |c: u32| format!("    {{\n        x[r][{c}u] = fma(quad_k_{c}(row), acc.c, c4);\n    }}\n");
        assert_eq!(text, format!("{}{}    y();\n", body(0), body(1)));
        let mut unknown = String::new();
        unroll(file, &[], &mut unknown);
        assert_eq!(unknown, file);
    }

    #[test]
    fn rows_that_fit_registers_are_one_slice() {
        let of = [1, 5, 64, 65, 130, 255, 256].map(slices);
        assert_eq!(of, [[1, 1], [1, 2], [1, 16], [3, 6], [5, 7], [8, 8], [8, 8]]);
    }

    #[test]
    fn loops_over_slices_and_whole_wide_rows_stay_loops() {
        let file = "for (var slice = 0u; slice < Q_SLICES; slice++) {\n}\nfor (var c = 0u; c < Q_QUADS; c++) {\n    y(c);\n}\n";
        let unrolled = |slices| {
            let constants = [("Q_SLICES", slices), ("Q_QUADS", 2)].map(|(name, x)| (name, Constant::Number(x)));
            let mut text = String::new();
            unroll(file, &constants, &mut text);
            text
        };
        let wide = file.replace("_SLICES;", "_SLICES + nothing;").replace("_QUADS;", "_QUADS + nothing;");
        assert_eq!(unrolled(2), wide);
        assert_eq!(unrolled(1), "{\n    const slice = 0u;\n}\n{\n    y(0u);\n}\n{\n    y(1u);\n}\n");
    }

    #[test]
    fn every_file_has_its_entry_point_once() {
        let files = [
            File::Forward,
            File::Prepare,
            File::Queries,
            File::Keys,
            File::Sums,
            File::Merge,
            File::Relayout,
            File::Fill,
        ];
        for file in files {
            let shader = Shader { file, constants: Vec::new(), scalars: &[], operands: Vec::new() };
            let source = shader.source(0);
            assert_eq!(source.matches("fn run(group: vec3<u32>, thread: u32)").count(), 1, "{}", file.name());
            assert_eq!(source.matches("@compute").count(), 1, "{}", file.name());
        }
    }

    #[test]
    fn an_operand_that_shares_a_written_buffer_is_declared_so() {
        let operand = |name, usage, slot| OperandKey { name, usage, slot, channels: 0, sharing: Sharing::Nothing };
        let numbers = Elements::Numbers(DType::F32);
        let shader = Shader {
            file: File::Fill,
            constants: Vec::new(),
            scalars: &[],
            operands: vec![operand("q", Use::Read(numbers), 0), operand("destination", Use::Write(numbers), 1)],
        };
        assert!(shader.source(0b10).contains("var<storage, read> words0"));
        assert!(shader.source(0b11).contains("var<storage, read_write> words0"));
    }
}
